"""Writing the folder that training reads, whole or not at all, and telling how far it is."""

import glob
import io
import os
import shutil
import socket
import sys
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import h5py
import numpy as np
from tqdm import tqdm

from semiseg.atomic import name_start, write_text
from semiseg.destinations import check_destination

Item = TypeVar("Item")
# Unicode categories: control characters, line and paragraph separators, and bytes that are not UTF-8.
UNLISTABLE = ("Cc", "Zl", "Zp", "Cs")


def check_new(dest: Path) -> None:
    """Raise ValueError unless `dest` does not exist or is an empty folder, OSError where it cannot be made."""
    check_destination(dest)
    if os.path.ismount(dest):
        raise ValueError(f"{dest} is where a file system is mounted, accepted is a new folder within it")
    if dest.exists() and (not dest.is_dir() or any(dest.iterdir())):
        raise ValueError(f"{dest} exists already, accepted is a new or an empty folder")


def is_listable(text: str) -> bool:
    """Whether a text file in UTF-8 holds it in one line."""
    return not any(unicodedata.category(character) in UNLISTABLE for character in text)


def check_name(name: str, path: Path) -> None:
    """Raise ValueError, naming the file it comes from, for a case's name that a list does not give back."""
    if name != name.strip() or not is_listable(name):
        raise ValueError(
            f"{str(path)!r}: names the case {name!r}, accepted are names in UTF-8 without line breaks and control "
            "characters, and without spaces at their ends"
        )


def write_case(
    path: Path,
    image: np.ndarray,  # [*S] float32
    label: np.ndarray | None,  # [*S] uint8
    spacing: tuple[float, ...] | None = None,  # mm
) -> None:
    """Write one new HDF5 file with `image`, where there is one `label`, and where it is not the whole dataset's the
    spacing. OSError if the disk is full or the file exists, as the one of another case does whose name a file system
    takes for the same."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # Through memory: on a full disk HDF5 ends the whole process by a segmentation fault.
    content = io.BytesIO()
    with h5py.File(content, "w") as file:
        for key, array in (("image", image), ("label", label)):
            if array is not None:
                file.create_dataset(key, data=array)  # not compressed: a part is read without the rest
        if spacing is not None:
            file.attrs["spacing"] = spacing
    try:
        with path.open("xb") as stream:
            stream.write(content.getbuffer())
    except OSError as error:
        raise OSError(f"{path.name}: cannot be written ({error.strerror})") from error


def write_list(path: Path, names: Iterable[str]) -> None:
    """Write one name a line."""
    write_text(path, "".join(f"{name}\n" for name in names))


@contextmanager
def whole_folder(dest: Path) -> Iterator[Path]:
    """Give a temporary folder beside `dest`; rename it to `dest` if the block ends without an exception.

    Notes what other processes have there: it is left behind where they are killed.
    """
    start = name_start(dest.name)
    # Containers that share a folder may have the same process numbers.
    temporary = dest.with_name(f".{start}.{socket.gethostname()}.{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)  # of a process with the same number that was killed
    others = dest.parent.glob(f".{glob.escape(start)}.*.[0-9]*")
    note(
        sorted(map(str, others)),
        f"unfinished folders of {dest.name} may be removed if no other preparation is running",
    )
    try:
        temporary.mkdir(parents=True)
    except OSError as error:
        raise OSError(f"{dest}: cannot be made ({error.strerror})") from error
    try:
        yield temporary
        os.replace(temporary, dest)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def progress(items: Sequence[Item], what: str) -> Iterable[Item]:
    return tqdm(items, desc=what, unit="scan")


def note(names: Sequence[str], what: str) -> None:
    if names:
        shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
        print(f"note: {len(names)} {what}: {shown}", file=sys.stderr)
