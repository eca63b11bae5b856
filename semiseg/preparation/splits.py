"""Which scan goes where: patients divided by their names, or as lists say."""

import hashlib
import itertools
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from semiseg.data.files import read_list


@dataclass(frozen=True)
class Scan:
    """One image, still in the files it came in."""

    name: str  # of the case, as lists have it
    patient: str  # scans of one patient never end up in different splits
    images: tuple[Path, ...]  # its channels in their order

    @property
    def image(self) -> Path:
        """The first of them, which stands for all."""
        return self.images[0]


@dataclass(frozen=True)
class LabelledScan(Scan):
    """One image and its label, still in the files they came in."""

    label: Path


Splits = Mapping[str, Sequence[LabelledScan]]  # by the name of the list


def split(scans: Sequence[LabelledScan], sizes: Mapping[str, int]) -> Splits:
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
    if not sizes:
        return {}
    first, *others = sizes
    counts = {name: max(1, round(len(patients) * sizes[name] / sum(sizes.values()))) for name in others}
    counts = {first: len(patients) - sum(counts.values()), **counts}
    remaining = iter(patients)
    chosen = {name: list(itertools.islice(remaining, count)) for name, count in counts.items()}
    return {
        name: [scan for patient in members for scan in scans if scan.patient == patient]
        for name, members in chosen.items()
    }


def listed(
    scans: Sequence[LabelledScan],
    lists: Mapping[str, Path],  # file of each list
    kind: str = "scans",  # what they are called in an error
) -> Splits:
    """Divide scans as lists say; those in none are left out.

    Raises ValueError for a name that is no scan and for a patient in two lists.
    """
    # The same name may be composed in one place and decomposed in another, such as on a Mac.
    by_name = {unicodedata.normalize("NFC", scan.name): scan for scan in scans}
    place: dict[str, str] = {}
    splits: dict[str, list[LabelledScan]] = {}
    for list_name, path in lists.items():
        names = [unicodedata.normalize("NFC", name) for name in read_list(path)]
        for name in names:
            if name not in by_name:
                raise ValueError(f"{path}: {name!r} is none of the {len(scans)} {kind} in the source")
        splits[list_name] = [by_name[name] for name in names]
        for scan in splits[list_name]:
            earlier = place.setdefault(scan.patient, list_name)
            if earlier != list_name:
                raise ValueError(f"{path}: the patient of {scan.name!r} is in {earlier} already")
    return splits
