"""Patches and poses that follow from what is in a dataset."""

import numpy as np
import pytest

from semiseg.preparation.plan import PATCH_VOXELS, patch_size, plan
from semiseg.preparation.survey import Facts


@pytest.mark.parametrize(("shape", "spacing", "expected"), [
    ((40, 36, 16), (1.2, 1, 2.5), (48, 32, 16)),  # the nearest multiples of 16, of two the larger
    ((3, 5, 7), (1, 1, 1), (16, 16, 16)),
    ((96, 96, 96), (1, 1, 1), (96, 96, 96)),
    ((256, 256, 64), (1, 1, 2), (112, 112, 64)),
    ((128, 128, 64), (1, 1, 4), (128, 128, 48)),
    ((512, 512, 16), (1, 1, 40), (224, 240, 16)),  # no side is cut below 16
    ((216, 256), (1.4, 1.4), (224, 256)),
    ((512, 400), (0.8, 0.8), (256, 256)),
])  # fmt: skip
def test_a_patch_is_the_scan_s_shape_cut_along_its_longest_side_in_mm(shape, spacing, expected):
    assert np.prod(expected) <= PATCH_VOXELS[len(shape)]
    assert patch_size(shape, spacing) == expected


def facts(spacing: tuple[float, ...]) -> Facts:
    return Facts("scan", "RAS", (40, 40, 40), spacing, (0.0,), (1.0,), "", {0: 9, 1: 1}, np.ones((1, 1), np.float32))


def test_the_median_spacing_decides_whether_axes_are_exchanged():
    for width, expected in ((1.15, "crop_dihedral"), (1.25, "crop")):
        scans = [facts((size, 1.0, 2.0)) for size in (width, width, 3 * width)]
        chosen = plan(scans, scans, ("background", "organ"), ["mr"])
        assert chosen.preprocessing.spacing == (width, 1.0, 2.0) and chosen.augmentation == expected
