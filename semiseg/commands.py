"""What every `python -m semiseg.<verb>` does about errors, outputs and the machine."""

import functools
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

EXPECTED = (ValueError, OSError, FloatingPointError)  # what bad input ends in: one line, no traceback
OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "bad_alloc")  # in a RuntimeError of PyTorch
LESS_MEMORY = (
    "less is taken by a smaller training.patch_size, training.labelled_batch and training.unlabelled_batch, "
    "or evaluation.batch"
)


def command(main: Callable[[list[str] | None], None]) -> Callable[..., None]:
    """Run a command with the heap kept; bad input or too little memory ends in one line on stderr and exit status 2,
    Ctrl-C in 130."""

    @functools.wraps(main)
    def wrapped(arguments: list[str] | None = None) -> None:
        from semiseg.engine.allocator import keep_heap

        keep_heap()
        try:
            main(arguments)
        except EXPECTED as error:
            _end(f"error: {error}", 2)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            _end(f"error: out of memory ({first_line(error)}); {LESS_MEMORY}", 2)
        except KeyboardInterrupt:
            _end("interrupted", 128 + signal.SIGINT)

    return wrapped


def is_out_of_memory(error: BaseException) -> bool:
    """Whether Python, NumPy or PyTorch, on the CPU or a GPU, found no memory."""
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(sign in str(error) for sign in OUT_OF_MEMORY)
    )


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type where it has none."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def check_destination(path: Path) -> None:
    """Raise ValueError or OSError, naming `path`, where no file or folder of this name can be made."""
    check_utf8(path)
    above = next(folder for folder in path.resolve().parents if os.path.exists(folder))
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


def _end(line: str, status: int) -> NoReturn:
    print(line, file=sys.stderr)
    sys.exit(status)
