"""What every `python -m semiseg.<verb>` does about errors and the machine."""

import functools
import signal
import sys
from collections.abc import Callable

EXPECTED = (ValueError, OSError, FloatingPointError)  # what bad input ends in: one line, no traceback


def command(main: Callable[[list[str] | None], None]) -> Callable[..., None]:
    """Run a command with the heap kept, bad input ending in one line on stderr and exit status 2, Ctrl-C in 130."""

    @functools.wraps(main)
    def wrapped(arguments: list[str] | None = None) -> None:
        from semiseg.engine.allocator import keep_heap

        keep_heap()
        try:
            main(arguments)
        except EXPECTED as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(2)
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            sys.exit(128 + signal.SIGINT)

    return wrapped
