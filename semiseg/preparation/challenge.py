"""What preparing a dataset takes, whichever challenge it comes from."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np

from semiseg.preparation.checks import LabelPlacement, as_classes, check_image
from semiseg.preparation.layout import check_name, check_new, note, progress, whole_folder, write_list
from semiseg.preparation.splits import LabelledScan, Splits, listed, split
from semiseg.preparation.volume import Volume, on_grid_of


class Challenge(ABC):
    """Finds, reads, checks and converts the scans of one challenge."""

    # file name of each list and how many patients of the whole challenge it takes
    splits: ClassVar[Mapping[str, int]]
    stored_labels: ClassVar[Mapping[int, int]]  # value in the label files -> class

    @abstractmethod
    def find(self, source: Path) -> list[LabelledScan]:
        """All scans below `source`, ordered by name.

        Raises FileNotFoundError where there is none or one is incomplete, ValueError where files contradict.
        """

    @abstractmethod
    def read(self, scan: LabelledScan) -> tuple[Volume, Volume]:
        """The image and the label as their files have them."""

    @abstractmethod
    def orientation(self, image: Volume) -> str | None:
        """Where an image's axes are turned to, so that equal scans are equal whatever the axes of their files."""

    @abstractmethod
    def check_spacing(self, image: Volume) -> None:
        """Raise ValueError if the spacing cannot be this challenge's."""

    @abstractmethod
    def convert(
        self,
        image: Volume,
        label: np.ndarray,  # [x, y, z] uint8, classes
    ) -> tuple[np.ndarray, np.ndarray]:
        """Image float32 and label uint8 as the HDF5 files hold them."""

    @abstractmethod
    def write(
        self,
        folder: Path,
        list_name: str,
        scan: LabelledScan,
        image: np.ndarray,  # [*S] float32
        label: np.ndarray,  # [*S] uint8
    ) -> None:
        """Write the files of one case."""

    def write_lists(self, folder: Path, splits: Splits) -> None:
        """Write the lists beside the cases."""
        for list_name, scans in splits.items():
            write_list(folder / list_name, (scan.name for scan in scans))

    def load(
        self,
        scan: LabelledScan,
        mirror: tuple[int, ...] = (),  # axes to mirror the label along
    ) -> tuple[Volume, np.ndarray, Volume, str]:
        """Return an image, turned, and its label on its grid as classes [x, y, z] uint8; then what `LabelPlacement`
        wants: the label as stored and the orientation of the image as stored.

        Raises ValueError if voxels are NaN or infinite or all the same, the grids differ, a label value is
        unknown or nothing is labelled.
        """
        stored_image, stored = self.read(scan)
        image = stored_image.turned(self.orientation(stored_image))
        self.check_spacing(image)
        check_image(image)
        classes = as_classes(on_grid_of(image, stored), self.stored_labels)
        if not classes.any():
            raise ValueError(f"{stored.path}: labels no voxel; expected some foreground")
        return image, np.flip(classes, mirror), stored, stored_image.orientation


def prepare(
    challenge: Challenge,
    source: Path,
    dest: Path,
    lists: Path | None = None,  # folder of the lists that say which case is in which split; None: split here
    mirror: tuple[int, ...] = (),  # axes to mirror every label along
    check_alignment: bool = True,
) -> Splits:
    """Write the plain HDF5 layout of a challenge's files into `dest`; it appears whole or not at all.

    Every scan is read and checked before the first is written. Raises ValueError or FileNotFoundError if
    `dest` holds something, a scan is incomplete or malformed, or a label lies mirrored against its image.
    """
    check_new(dest)
    dest = dest.resolve()
    if not source.is_dir():
        raise FileNotFoundError(f"{source}: no such folder; expected what the challenge hands out")
    scans = challenge.find(source)
    for scan in scans:
        check_name(scan.name, scan.image)
    if lists is None:
        splits = split(scans, challenge.splits)
    else:
        splits = listed(scans, {list_name: lists / list_name for list_name in challenge.splits})
    chosen = [scan for members in splits.values() for scan in members]
    note(
        [scan.name for scan in scans if scan not in chosen], "scans are in none of the lists and are left out"
    )
    check(challenge, chosen, mirror, check_alignment)
    with whole_folder(dest) as folder:
        for list_name, scan in progress(
            [(list_name, scan) for list_name, members in splits.items() for scan in members], "writing"
        ):
            # Without names for them, as these would keep one scan while the next is read.
            challenge.write(folder, list_name, scan, *challenge.convert(*challenge.load(scan, mirror)[:2]))
        challenge.write_lists(folder, splits)
    return splits


def check(
    challenge: Challenge,
    scans: Sequence[LabelledScan],
    mirror: tuple[int, ...],
    check_alignment: bool,
) -> None:
    """Read every scan; raise ValueError for what cannot be right and note what is odd."""
    placement = LabelPlacement(mirror, check_alignment)
    for scan in progress(scans, "checking"):
        placement.look_at(scan.name, *challenge.load(scan, mirror))  # no names: they would keep it as long
    placement.finish()


def box_around(
    label: np.ndarray,  # [*S]
    margins: Sequence[int],  # voxels on both sides of each axis
) -> tuple[slice, ...]:
    """The smallest box with every labelled voxel, enlarged but kept inside the volume."""
    box = []
    for axis, margin in enumerate(margins):
        others = tuple(other for other in range(label.ndim) if other != axis)
        there = np.flatnonzero(label.any(axis=others))
        box.append(slice(max(int(there[0]) - margin, 0), int(there[-1]) + 1 + margin))
    return tuple(box)
