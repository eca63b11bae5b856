"""What errors of Python, NumPy, PyTorch and libraries that read files say."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "bad_alloc")  # in a RuntimeError of PyTorch


def is_out_of_memory(error: BaseException) -> bool:
    """Whether Python, NumPy or PyTorch, on the CPU or a GPU, found no memory."""
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(sign in str(error) for sign in OUT_OF_MEMORY)
    )


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type where it has none."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


@contextmanager
def reading(path: Path, what: str) -> Iterator[None]:
    """Turn whatever a library raises for a file it cannot read into one ValueError.

    Raises FileNotFoundError where the file is missing.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: missing; expected a {what} file")
    try:
        yield
    except Exception as error:  # of damaged files the libraries raise nearly everything there is
        raise ValueError(f"{path}: cannot be read as {what} ({first_line(error)})") from error
