"""What preparing a dataset takes, whichever challenge it comes from."""

import hashlib
import itertools
import os
import shutil
import sys
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, TypeVar

import h5py
import numpy as np
from tqdm import tqdm

from semiseg.data.files import read_list
from semiseg.preparation.alignment import DECISIVE, best_mirroring
from semiseg.preparation.volume import Volume, on_grid_of, origins_differ

AXES = "xyz"
Item = TypeVar("Item")


@dataclass(frozen=True)
class Scan:
    """One image and its label, still in the challenge's files."""

    name: str  # of the case, as lists have it
    patient: str  # scans of one patient never end up in different splits
    image: Path
    label: Path


Splits = Mapping[str, Sequence[Scan]]  # by the name of the list


class Challenge(ABC):
    """Finds, reads, checks and converts the scans of one challenge."""

    splits: ClassVar[
        Mapping[str, int]
    ]  # file name of each list and how many patients of the whole challenge it takes
    stored_labels: ClassVar[Mapping[int, int]]  # value in the label files -> class

    @abstractmethod
    def find(self, source: Path) -> list[Scan]:
        """All scans below `source`, ordered by name.

        Raises FileNotFoundError where there is none or one is incomplete, ValueError where files contradict.
        """

    @abstractmethod
    def read(self, scan: Scan) -> tuple[Volume, Volume]:
        """Image and label as stored, the image's axes as they are to be written."""

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
        scan: Scan,
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
        scan: Scan,
        mirror: tuple[int, ...] = (),  # axes to mirror the label along
    ) -> tuple[Volume, np.ndarray, Volume]:
        """Return an image, its label on its grid as classes [x, y, z] uint8, and the label as stored.

        Raises ValueError if voxels are NaN or infinite or all the same, the grids differ, a label value is
        unknown or nothing is labelled.
        """
        image, stored = self.read(scan)
        self.check_spacing(image)
        if not np.isfinite(image.values).all():
            raise ValueError(f"{image.path}: holds NaN or infinity; expected finite intensities")
        if image.values.min() == image.values.max():
            raise ValueError(f"{image.path}: holds {image.values.flat[0]} everywhere; expected an image")
        values = on_grid_of(image, stored).values
        unknown = ~np.isin(values, list(self.stored_labels))
        if unknown.any():
            raise ValueError(
                f"{stored.path}: holds the label {values[unknown][0]}; "
                f"expected {', '.join(map(str, self.stored_labels))}"
            )
        label = np.zeros(values.shape, np.uint8)
        for value, number in self.stored_labels.items():
            label[values == value] = number
        if not label.any():
            raise ValueError(f"{stored.path}: labels no voxel; expected some foreground")
        return image, np.flip(label, mirror), stored


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
    dest = dest.resolve()
    if dest.exists() and (not dest.is_dir() or any(dest.iterdir())):
        raise ValueError(f"{dest} exists already; accepted is a new or an empty folder")
    if not source.is_dir():
        raise FileNotFoundError(f"{source}: no such folder; expected what the challenge hands out")
    scans = challenge.find(source)
    splits = split(scans, challenge.splits) if lists is None else listed(scans, challenge.splits, lists)
    check(challenge, [scan for chosen in splits.values() for scan in chosen], mirror, check_alignment)
    with whole_folder(dest) as folder:
        for list_name, scan in _progress(
            [(list_name, scan) for list_name, chosen in splits.items() for scan in chosen], "writing"
        ):
            image, label, _ = challenge.load(scan, mirror)
            challenge.write(folder, list_name, scan, *challenge.convert(image, label))
        challenge.write_lists(folder, splits)
    return splits


def check(
    challenge: Challenge,
    scans: Sequence[Scan],
    mirror: tuple[int, ...],
    check_alignment: bool,
) -> None:
    """Read every scan; raise ValueError for what cannot be right and warn of what is odd."""
    orientations: dict[str, Scan] = {}
    mirrored: dict[str, tuple[tuple[int, ...], float]] = {}
    turned, displaced, doubtful = [], [], []
    for scan in _progress(scans, "checking"):
        image, label, stored = challenge.load(scan, mirror)
        orientations.setdefault(image.orientation, scan)
        if len(orientations) > 1:
            (one, first), (other, second) = orientations.items()
            raise ValueError(
                f"{second.image}: its axes lead to {other}, those of {first.image} to {one}; "
                "expected one orientation for the whole dataset"
            )
        if stored.orientation != image.orientation:
            turned.append(f"{scan.name} ({stored.orientation})")
        if origins_differ(image, on_grid_of(image, stored)):
            displaced.append(scan.name)
        axes, ratio = best_mirroring(image.values, label) if check_alignment else ((), 1.0)
        if ratio > DECISIVE:
            mirrored[scan.name] = axes, ratio
        elif axes:
            doubtful.append(f"{scan.name} ({_axes(axes)})")
    _note(
        turned,
        "labels are stored along other axes than their images; their headers say how, so they are turned",
    )
    _note(displaced, "headers place the label elsewhere than its image; voxels are matched by their index")
    _note(
        doubtful, "labels fit their images a little better mirrored along the axes in brackets; look at them"
    )
    if mirrored:
        raise ValueError(_mirrored_labels(mirrored, len(scans), mirror))


def _mirrored_labels(
    mirrored: Mapping[str, tuple[tuple[int, ...], float]],  # scan -> axes and how much better it then fits
    count: int,  # scans looked at
    mirror: tuple[int, ...],  # axes all labels were mirrored along already
) -> str:
    name, (axes, ratio) = next(iter(mirrored.items()))
    ways = Counter(_axes(way) for way, _ in mirrored.values())
    # Mirroring twice along an axis is not mirroring along it.
    remedy = _axes(sorted(set(axes) ^ set(mirror)))
    return (
        f"{len(mirrored)} of {count} labels lie mirrored against their images, whatever their headers say "
        f"({', '.join(f'{number} along {way}' for way, number in ways.most_common())}): {name} fits "
        f"{ratio:.0f} times better mirrored along {_axes(axes)}; look at it, then "
        + (f"mirror all labels with --flip-labels {remedy}" if remedy else "leave out --flip-labels")
        + ", correct the files that are wrong, or keep the labels as they are with --skip-flip-check"
    )


def split(scans: Sequence[Scan], sizes: Mapping[str, int]) -> Splits:
    """Divide patients in the proportion of `sizes`, in an order that only their names decide.

    The order is that of the names' SHA-256: as good as random, so that no split gets one hospital or one
    diagnosis, and the same on every machine.
    """
    patients = sorted(
        {scan.patient for scan in scans}, key=lambda name: hashlib.sha256(name.encode()).hexdigest()
    )
    if len(patients) < len(sizes):
        raise ValueError(
            f"there are {len(patients)} patients; expected at least one for each of {', '.join(sizes)}"
        )
    first, *others = sizes
    counts = {name: max(1, round(len(patients) * sizes[name] / sum(sizes.values()))) for name in others}
    counts = {first: len(patients) - sum(counts.values()), **counts}
    remaining = iter(patients)
    chosen = {name: list(itertools.islice(remaining, count)) for name, count in counts.items()}
    return {
        name: [scan for patient in members for scan in scans if scan.patient == patient]
        for name, members in chosen.items()
    }


def listed(scans: Sequence[Scan], sizes: Mapping[str, int], lists: Path) -> Splits:
    """Divide scans as the lists in a folder say.

    Raises ValueError for a name that is no scan and for a patient in two lists; scans in no list are left out
    and noted.
    """
    by_name = {scan.name: scan for scan in scans}
    place: dict[str, str] = {}
    splits = {list_name: read_list(lists / list_name) for list_name in sizes}
    for list_name, names in splits.items():
        for name in names:
            if name not in by_name:
                raise ValueError(
                    f"{lists / list_name}: {name!r} is none of the {len(scans)} scans in the source"
                )
            earlier = place.setdefault(by_name[name].patient, list_name)
            if earlier != list_name:
                raise ValueError(f"{lists / list_name}: the patient of {name!r} is in {earlier} already")
    named = set(itertools.chain.from_iterable(splits.values()))
    _note([name for name in by_name if name not in named], "scans are in none of the lists and are left out")
    return {list_name: [by_name[name] for name in names] for list_name, names in splits.items()}


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


def write_case(path: Path, image: np.ndarray, label: np.ndarray) -> None:
    """Write one HDF5 file with `image` and `label`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        file.create_dataset("image", data=image, compression="gzip")
        file.create_dataset("label", data=label, compression="gzip")


def write_list(path: Path, names: Iterable[str]) -> None:
    """Write one name a line."""
    path.write_text("".join(f"{name}\n" for name in names))


@contextmanager
def whole_folder(dest: Path) -> Iterator[Path]:
    """Give a temporary folder beside `dest`; rename it to `dest` if the block ends without an exception."""
    temporary = dest.with_name(f".{dest.name}.{os.getpid()}")
    temporary.mkdir(parents=True)
    try:
        yield temporary
        os.replace(temporary, dest)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _progress(items: Sequence[Item], what: str) -> Iterable[Item]:
    return tqdm(items, desc=what, unit="scan")


def _note(names: Sequence[str], what: str) -> None:
    if names:
        shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
        print(f"note: {len(names)} {what}: {shown}", file=sys.stderr)


def _axes(axes: Iterable[int]) -> str:
    return "".join(AXES[axis] for axis in axes)
