"""An operation that takes turns with others, and how long each call of it took."""

import time
from typing import Any


class Timed:
    """Forward and backward, each timed; what they compute is the subclass's."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = {"forward": [], "backward": [], "step": []}

    def forward(self) -> Any:
        raise NotImplementedError

    def backward(self, results: Any) -> Any:
        """The gradients, none of an operation that has none."""
        raise NotImplementedError

    def forward_and_backward(self) -> Any:
        return self.backward(self.forward())

    def step(self) -> None:
        """Forward and backward once, timed."""
        start = time.perf_counter()
        results = self.forward()
        middle = time.perf_counter()
        gradients = self.backward(results)
        end = time.perf_counter()
        for part, seconds in (("forward", middle - start), ("backward", end - middle), ("step", end - start)):
            self.seconds[part].append(seconds)
        del results, gradients

    def discard_times(self) -> None:
        for seconds in self.seconds.values():
            seconds.clear()
