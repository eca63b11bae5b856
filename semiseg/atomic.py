"""Files that appear whole or not at all."""

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def name_start(name: str) -> str:
    """A name, or its first 150 bytes: with a few more characters a longer one would be too long for a file system."""
    return os.fsencode(name)[:150].decode(errors="ignore")


@contextmanager
def replace_atomically(path: Path) -> Iterator[Path]:
    """Give a temporary name beside `path`; rename it to `path` if the block ends without an exception.

    An OSError of the block, such as a full disk, names `path`.
    """
    # The ending tells writers the format.
    temporary = path.with_name(f".{name_start(path.stem)}.{os.getpid()}{path.suffix}")
    try:
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        raise OSError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def remove_leftovers(folder: Path) -> None:
    """Remove the temporary files of processes that were killed while they wrote into a folder."""
    for path in folder.glob(".*"):
        if re.fullmatch(r"\..+\.\d+(\.\w+)?", path.name):
            path.unlink()


def write_text(path: Path, text: str) -> None:
    """Write a text file in UTF-8 atomically."""
    with replace_atomically(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_new_text(path: Path, text: str) -> None:
    """The same of a file that nobody has made yet. Raises FileExistsError where somebody has."""
    path.open("x").close()
    try:
        write_text(path, text)
    except BaseException:
        path.unlink(missing_ok=True)
        raise


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically. Raises ValueError for a NaN or infinity, which JSON has not."""
    write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")
