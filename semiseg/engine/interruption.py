"""Stopping between two steps when the user or the machine asks for it."""

import signal
import threading
from types import FrameType
from typing import Any, Self

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(Exception):
    """A run stopped by a signal; it can be resumed. `status` is the exit status that a shell gives it."""

    def __init__(self, message: str, number: signal.Signals):
        super().__init__(message)
        self.status = 128 + number


class Interruption:
    """While entered, the first Ctrl-C or SIGTERM is only noted in `signal`; the next one has its usual effect.

    In a thread other than the main one, which gets no signals, nothing is noted.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            # Not what is ignored, as Ctrl-C is by what a script started in the background.
            taken = [number for number in SIGNALS if signal.getsignal(number) not in (signal.SIG_IGN, None)]
            self._previous = {number: signal.signal(number, self._note) for number in taken}
        return self

    def __exit__(self, *exception: object) -> None:
        self._restore()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signal = signal.Signals(number)
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
