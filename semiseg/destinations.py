"""Files and folders that are to be written, checked before the work is done."""

import os
from pathlib import Path

LONGEST_NAME = 255  # bytes, on nearly all file systems


def check_destination(path: Path) -> None:
    """Raise ValueError or OSError, naming `path`, where no file or folder of this name can be made."""
    check_utf8(path)
    if any(len(part.encode()) > LONGEST_NAME for part in path.parts):
        raise ValueError(f"{path}: accepted are names of up to {LONGEST_NAME} bytes")
    try:
        path.stat()
    except ValueError as error:  # of a NUL character
        raise ValueError(f"{str(path)!r}: no file can have this name ({error})") from None
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        pass  # the folders above say whether it can be made
    except OSError as error:  # such as links in a loop
        raise OSError(f"{path}: cannot be written ({error.strerror})") from None
    folders = path.resolve().parents
    if not folders:
        raise ValueError(f"{path}: is the root of the file system, accepted is a new name below it")
    above = next(folder for folder in folders if os.path.exists(folder))
    if not above.is_dir():
        raise NotADirectoryError(f"{path}: cannot be written, as {above} is no folder")
    if not os.access(above, os.W_OK | os.X_OK):
        raise PermissionError(f"{path}: cannot be written, as the folder {above} is not writable")


def check_utf8(path: Path) -> None:
    """Raise ValueError where lists, configurations and messages cannot hold the name of a file."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise ValueError(f"{str(path)!r}: accepted are names in UTF-8") from None
