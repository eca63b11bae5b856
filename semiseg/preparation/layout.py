"""Writing the folder that training reads, whole or not at all, and telling how far it is."""

import os
import shutil
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import h5py
import numpy as np
from tqdm import tqdm

Item = TypeVar("Item")


def check_new(dest: Path) -> None:
    """Raise ValueError unless `dest` does not exist or is an empty folder."""
    if dest.exists() and (not dest.is_dir() or any(dest.iterdir())):
        raise ValueError(f"{dest} exists already; accepted is a new or an empty folder")


def write_case(
    path: Path,
    image: np.ndarray,  # [*S] float32
    label: np.ndarray | None,  # [*S] uint8
) -> None:
    """Write one HDF5 file with `image` and, where there is one, `label`. OSError if the disk is full."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with h5py.File(path, "w") as file:
            for key, array in (("image", image), ("label", label)):
                if array is not None:
                    file.create_dataset(key, data=array, compression="gzip")
    except (OSError, RuntimeError) as error:  # HDF5 raises the latter where closing the file fails
        raise OSError(f"{path.name}: cannot be written ({str(error).splitlines()[0]})") from error


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


def progress(items: Sequence[Item], what: str) -> Iterable[Item]:
    return tqdm(items, desc=what, unit="scan")


def note(names: Sequence[str], what: str) -> None:
    if names:
        shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
        print(f"note: {len(names)} {what}: {shown}", file=sys.stderr)
