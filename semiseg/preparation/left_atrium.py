"""2018 Atrial Segmentation Challenge: `<id>/lgemri.nrrd` and `<id>/laendo.nrrd`."""

from pathlib import Path
from typing import ClassVar

import numpy as np

from semiseg.data.left_atrium import LeftAtrium
from semiseg.data.volumes import TEST_LIST, TRAINING_LIST
from semiseg.preparation.challenge import Challenge, box_around
from semiseg.preparation.layout import write_case
from semiseg.preparation.splits import LabelledScan
from semiseg.preparation.volume import Volume
from semiseg.preparation.volume_files import read_nrrd

SMALLEST_SIDE = 112  # voxels in the plane of the slices, the patch everyone trains on
MARGIN = 15
ACCEPTED_SPACINGS = (LeftAtrium.spacing[0], 1.0)  # mm; the challenge's own headers say 1 where 0.625 is meant


class LeftAtriumChallenge(Challenge):
    """The image is turned to LPS, standardised over the whole scan, then cropped around the atrium; all slices stay."""

    splits: ClassVar = {TRAINING_LIST: 80, TEST_LIST: 20}
    stored_labels: ClassVar = {0: 0, 255: 1}

    def find(self, source: Path) -> list[LabelledScan]:
        images = sorted(source.glob("*/lgemri.nrrd"))
        if not images:
            raise FileNotFoundError(
                f"{source}: no <id>/lgemri.nrrd in it; expected the challenge's 'Training Set'"
            )
        scans = [
            LabelledScan(path.parent.name, path.parent.name, (path,), path.with_name("laendo.nrrd")) for path in images
        ]
        for scan in scans:
            if not scan.label.is_file():
                raise FileNotFoundError(f"{scan.label}: missing; expected the label of lgemri.nrrd beside it")
        return scans

    def read(self, scan: LabelledScan) -> tuple[Volume, Volume]:
        return read_nrrd(scan.image), read_nrrd(scan.label)

    def orientation(self, image: Volume) -> str | None:
        return LeftAtrium.preprocessing.orientation

    def check_spacing(self, image: Volume) -> None:
        if not any(np.allclose(image.spacing, accepted, rtol=0.01) for accepted in ACCEPTED_SPACINGS):
            raise ValueError(
                f"{image.path}: spacing is {tuple(round(size, 4) for size in image.spacing)} mm; expected "
                f"{' or '.join(str(size) for size in ACCEPTED_SPACINGS)} along every axis"
            )

    def convert(self, image: Volume, label: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        margins = [
            MARGIN + max(SMALLEST_SIDE - (side.stop - side.start), 0) // 2
            for side in box_around(label, (0, 0))
        ]
        box = box_around(label, margins)
        return LeftAtrium.preprocessing.channels[0].scaled(image.values)[box], label[box]

    def write(self, folder: Path, list_name: str, scan: LabelledScan, image: np.ndarray, label: np.ndarray) -> None:
        write_case(LeftAtrium(folder).path(scan.name), image, label)
