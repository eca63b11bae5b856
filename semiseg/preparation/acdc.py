"""Automated Cardiac Diagnosis Challenge: `patientNNN/` with `Info.cfg` and two labelled frames in NIfTI."""

from pathlib import Path
from typing import ClassVar

import numpy as np

from semiseg.data.acdc import ACDC, TRAINING_SLICES_LIST, slice_path
from semiseg.data.volumes import TEST_LIST, TRAINING_LIST, VALIDATION_LIST
from semiseg.preparation.challenge import Challenge
from semiseg.preparation.layout import write_case, write_list
from semiseg.preparation.splits import LabelledScan, Splits
from semiseg.preparation.volume import SAME_SPACING, Volume
from semiseg.preparation.volume_files import read_nifti


class ACDCChallenge(Challenge):
    """The image is brought to [0, 1] by the smallest and largest value of its volume; nothing is cropped.

    It is turned as prediction turns it, so that its last axis leads from slice to slice.
    A patient's end-diastolic frame becomes `patientNNN_frame01`, the end-systolic one `patientNNN_frame02`,
    whatever their numbers in the cine. Training cases are slices, the others volumes.
    """

    splits: ClassVar = {TRAINING_LIST: 70, VALIDATION_LIST: 10, TEST_LIST: 20}
    stored_labels: ClassVar = {0: 0, 1: 1, 2: 2, 3: 3}

    def find(self, source: Path) -> list[LabelledScan]:
        folders = sorted(path for path in source.glob("patient[0-9]*") if path.is_dir())
        if not folders:
            raise FileNotFoundError(
                f"{source}: no patientNNN folder in it; expected the challenge's 'training'"
            )
        return [scan for folder in folders for scan in _frames(folder)]

    def read(self, scan: LabelledScan) -> tuple[Volume, Volume]:
        return read_nifti(scan.image), read_nifti(scan.label)

    def orientation(self, image: Volume) -> str:
        return image.slice_orientation[::-1]

    def check_spacing(self, image: Volume) -> None:
        x, y, z = image.spacing
        if abs(x - y) > SAME_SPACING * x or z < x:
            raise ValueError(
                f"{image.path}: spacing is ({x:.3f}, {y:.3f}, {z:.3f}) mm; "
                "expected the same along x and y, and more along z, from slice to slice"
            )

    def convert(self, image: Volume, label: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return ACDC.preprocessing.channels[0].scaled(image.values).transpose(2, 1, 0), label.transpose(2, 1, 0)

    def write(self, folder: Path, list_name: str, scan: LabelledScan, image: np.ndarray, label: np.ndarray) -> None:
        if list_name != TRAINING_LIST:
            write_case(ACDC(folder).path(scan.name), image, label)
            return
        for name, image_slice, label_slice in zip(_slices(scan, len(image)), image, label, strict=True):
            write_case(slice_path(folder, name), image_slice, label_slice)

    def write_lists(self, folder: Path, splits: Splits) -> None:
        super().write_lists(folder, splits)
        slices = []
        for scan in splits[TRAINING_LIST]:
            count = len(list(slice_path(folder, "").parent.glob(f"{scan.name}_slice_*.h5")))
            slices += _slices(scan, count)
        write_list(folder / TRAINING_SLICES_LIST, slices)


def _frames(folder: Path) -> list[LabelledScan]:
    path = folder / "Info.cfg"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: missing; expected the frames ED and ES of the patient")
    entries = dict(line.split(":", 1) for line in path.read_text(errors="replace").splitlines() if ":" in line)
    scans = []
    for number, phase in enumerate(("ED", "ES"), start=1):
        frame = entries.get(phase, "").strip()
        if not frame.isdecimal():
            raise ValueError(f"{path}: {phase} is {frame!r}; expected the number of a frame")
        image, label = (
            folder / f"{folder.name}_frame{int(frame):02d}{ending}.nii.gz" for ending in ("", "_gt")
        )
        for file in (image, label):
            if not file.is_file():
                raise FileNotFoundError(f"{file}: missing; {path.name} says {phase} is frame {frame}")
        scans.append(LabelledScan(f"{folder.name}_frame{number:02d}", folder.name, (image,), label))
    return scans


def _slices(scan: LabelledScan, count: int) -> list[str]:
    return [f"{scan.name}_slice_{number}" for number in range(1, count + 1)]
