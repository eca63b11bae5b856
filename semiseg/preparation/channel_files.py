"""Files that are the channels of one scan, by their names: NAME_0000, NAME_0001 and so on."""

import re
from collections.abc import Iterable
from pathlib import Path

from semiseg.preparation.file_names import stem

NUMBER = re.compile(r"_(\d{4})$")  # of the channel, behind a scan's name
FIRST = "_0000"


def has_number(path: Path) -> bool:
    """Whether a file's name, without its ending, ends as that of a channel."""
    return NUMBER.search(stem(path)) is not None


def scan_name(path: Path) -> str:
    """What the files of a scan's channels are all called before the number."""
    return NUMBER.sub("", stem(path))


def grouped(files: Iterable[Path]) -> list[tuple[Path, ...]]:
    """Files of channels scan by scan, each in the order of the numbers.

    Raises ValueError where two have one number, or a scan's are not numbered as those of the others, from 0000 on.
    """
    groups: dict[str, dict[str, Path]] = {}
    for path in sorted(files):
        group, number = groups.setdefault(scan_name(path), {}), stem(path)[-len(FIRST) :]
        if number in group:
            raise ValueError(f"{path} and {group[number].name} are both channel {number}; expected one of them")
        group[number] = path
    most = max(map(len, groups.values()), default=0)
    expected = [f"_{number:04d}" for number in range(most)]
    for name, group in groups.items():
        if list(group) != expected:
            first = next(iter(group.values()))
            raise ValueError(
                f"{first}: the channels of {name} are {', '.join(group)}; expected {', '.join(expected)} of every scan"
            )
    return [tuple(group.values()) for group in groups.values()]
