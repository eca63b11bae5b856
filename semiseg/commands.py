"""What every `python -m semiseg.<verb>` does about errors and the machine."""

import functools
import signal
import sys
from collections.abc import Callable
from typing import NoReturn

from semiseg.errors import first_line, is_out_of_memory

EXPECTED = (ValueError, OSError, FloatingPointError)  # what bad input ends in: one line, no traceback
LESS_MEMORY = (
    "less is taken by a smaller training.patch_size, training.labelled_batch and training.unlabelled_batch, "
    "or evaluation.batch"
)


def command(main: Callable[[list[str] | None], None]) -> Callable[..., None]:
    """Run a command with the heap kept.

    Bad input or too little memory ends in one line on stderr and exit status 2, Ctrl-C in 130.
    """

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


def _end(line: str, status: int) -> NoReturn:
    print(line, file=sys.stderr)
    sys.exit(status)
