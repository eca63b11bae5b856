"""Whether a label lies mirrored against its image."""

import os
from pathlib import Path

import challenge_files as files
import numpy as np
import pytest

from semiseg.data import open_dataset
from semiseg.data.phantom import Phantom
from semiseg.preparation import alignment
from semiseg.preparation.alignment import DECISIVE, MIRRORINGS, best_mirroring

REAL_DATA = Path(os.environ.get("SEMISEG_DATA", ""))


def test_no_false_alarm_on_the_phantom():
    """Look-alikes, blur and noise, contrast of either sign: a correct label is never called mirrored."""
    cases = Phantom(seed=0, test=8).evaluation_cases("test")
    assert max(best_mirroring(case.image[0], case.label)[1] for case in cases) < DECISIVE


@pytest.mark.parametrize("axes", MIRRORINGS[1:])
def test_fit_of_a_mirrored_label(axes):
    image, label = files.anatomy(np.random.default_rng(0), (30, 28, 20), 3)
    assert best_mirroring(image, label) == ((), 1.0)
    found, ratio = best_mirroring(-3 * image + 7, np.flip(label, axes))
    assert found == axes and ratio > DECISIVE


@pytest.mark.parametrize("axes", [(0,), (1, 2)])
def test_a_sample_of_a_large_label_is_enough(axes, monkeypatch):
    image, label = files.anatomy(np.random.default_rng(0), (60, 56, 40), 3)
    seen = []
    fit = alignment._fit

    def recorded(ranks, classes):
        seen.append((ranks.size, classes.size))
        return fit(ranks, classes)

    monkeypatch.setattr(alignment, "_fit", recorded)
    monkeypatch.setattr(alignment, "SAMPLE", 2000)
    assert best_mirroring(image, label) == ((), 1.0)
    found, ratio = best_mirroring(image, np.flip(label, axes))
    assert found == axes and ratio > DECISIVE
    assert len(set(seen)) == 1 and 1000 <= seen[0][0] == seen[0][1] <= 2000


def test_nothing_to_tell_apart():
    label = np.zeros((6, 6, 6), np.uint8)
    label[2:4, 2:4, 2:4] = 1
    image = np.random.default_rng(0).random((6, 6, 6))
    assert best_mirroring(image, label) == ((), 1.0)  # symmetric: every mirroring is the same
    assert best_mirroring(np.ones((6, 6, 6)), np.roll(label, 1, 0)) == ((), 1.0)


@pytest.mark.data
@pytest.mark.slow
@pytest.mark.parametrize("name", ["la", "acdc"])
def test_real_labels_raise_no_false_alarm_and_mirrored_ones_are_found(name):
    dataset = open_dataset(name, REAL_DATA / name.upper())
    ratios, found = [], []
    for case in dataset.evaluation_cases("test"):
        ratios.append(best_mirroring(case.image[0], case.label)[1])
        for axes in ((0,), (1,), (2,)):
            mirrored, ratio = best_mirroring(case.image[0], np.flip(case.label, axes))
            found.append(mirrored == axes and ratio > DECISIVE)
    assert max(ratios) < DECISIVE and np.mean(found) > 0.85
