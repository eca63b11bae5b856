"""What errors of Python, NumPy and PyTorch say."""

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
