"""Pancreas-CT (National Institutes of Health): DICOM series in `PANCREAS_NNNN/`, and `labelNNNN.nii.gz`."""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import numpy as np

from semiseg.data.description import DatasetDescription
from semiseg.data.own import DESCRIPTION
from semiseg.data.pancreas import Pancreas
from semiseg.data.volumes import TEST_LIST, TRAINING_LIST
from semiseg.preparation.challenge import Challenge, box_around
from semiseg.preparation.dicom import read_dicom_series
from semiseg.preparation.layout import write_case
from semiseg.preparation.splits import LabelledScan, Splits
from semiseg.preparation.volume import Volume, resample_label
from semiseg.preparation.volume_files import read_nifti

PREPROCESSING = Pancreas.preprocessing
INTENSITY = PREPROCESSING.channels[0]
MARGIN = 25  # voxels of 1 mm
LARGEST_SPACING = 5.0  # mm


class PancreasCT(Challenge):
    """The image is windowed, resampled to 1 mm, cropped around the pancreas, and the crop standardised.

    Of a new scan nobody knows the crop, and a whole one has other statistics: the description holds the mean and
    deviation of a usual training crop instead.
    """

    splits: ClassVar = {TRAINING_LIST: 62, TEST_LIST: 20}
    stored_labels: ClassVar = {0: 0, 1: 1}

    def __init__(self) -> None:
        self._crops: dict[Path, tuple[float, float]] = {}  # mean and deviation by the scan's image

    def find(self, source: Path) -> list[LabelledScan]:
        folders = _by_number(path for path in source.rglob("PANCREAS_[0-9]*") if path.is_dir())
        labels = _by_number(source.rglob("label[0-9]*.nii*"))
        if not folders:
            raise FileNotFoundError(
                f"{source}: no folder PANCREAS_NNNN below it; expected the collection's DICOM files"
            )
        for number, folder in folders.items():
            if number not in labels:
                raise FileNotFoundError(
                    f"{source}: no label{number}.nii.gz below it; expected the label of {folder}"
                )
        return [LabelledScan(f"image{number}", number, (folder,), labels[number]) for number, folder in folders.items()]

    def read(self, scan: LabelledScan) -> tuple[Volume, Volume]:
        return read_dicom_series(scan.image), read_nifti(scan.label)

    def orientation(self, image: Volume) -> str | None:
        return PREPROCESSING.orientation

    def check_spacing(self, image: Volume) -> None:
        if max(image.spacing) > LARGEST_SPACING:
            raise ValueError(
                f"{image.path}: spacing is {tuple(round(size, 3) for size in image.spacing)} mm; "
                f"expected at most {LARGEST_SPACING} along every axis"
            )

    def convert(self, image: Volume, label: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        windowed = replace(image, values=INTENSITY.clipped(image.values))
        resampled = windowed.resampled(Pancreas.spacing).values
        mask = resample_label(label, image.spacing, Pancreas.spacing)
        if not mask.any():
            raise ValueError(f"{image.path}: nothing labelled is left at {Pancreas.spacing} mm")
        box = box_around(mask, (MARGIN,) * 3)
        crop = resampled[box]
        self._crops[image.path] = float(crop.mean(dtype=float)), float(crop.std(dtype=float))
        return INTENSITY.scaled(crop), mask[box]

    def write(self, folder: Path, list_name: str, scan: LabelledScan, image: np.ndarray, label: np.ndarray) -> None:
        write_case(Pancreas(folder).path(scan.name), image, label)

    def write_lists(self, folder: Path, splits: Splits) -> None:
        super().write_lists(folder, splits)
        crops = [self._crops[scan.image] for scan in splits[TRAINING_LIST]]
        mean, deviation = (float(f"{value:.6g}") for value in np.mean(crops, axis=0))
        intensity = replace(INTENSITY, kind="fixed", mean=mean, deviation=deviation)
        preprocessing = replace(PREPROCESSING, channels=(intensity,))
        DatasetDescription(Pancreas.class_names, Pancreas.dimensions, preprocessing).save(
            folder / DESCRIPTION
        )


def _by_number(paths: Iterable[Path]) -> dict[str, Path]:
    """PANCREAS_0001 and label0001.nii.gz by 0001."""
    found: dict[str, Path] = {}
    for path in sorted(paths):
        number = path.name.split(".")[0].removeprefix("PANCREAS_").removeprefix("label")
        if number in found:
            raise ValueError(f"{path} is there twice, the other is {found[number]}; expected one")
        found[number] = path
    return found
