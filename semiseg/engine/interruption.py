"""Stopping between two steps when the user or the machine asks for it."""

import signal
import threading
from types import FrameType
from typing import Any, Self

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(Exception):
    """A run stopped because of a signal, and can be gone on with. `status` is the exit status of the shells."""

    def __init__(self, message: str, number: signal.Signals):
        super().__init__(message)
        self.status = 128 + number


class Interruption:
    """While entered, the first Ctrl-C or SIGTERM is only noted in `signal`; the next one acts at once, as ever.

    In a thread other than the main one, which gets no signals, nothing is noted.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, *exception: object) -> None:
        self._restore()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signal = signal.Signals(number)
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
