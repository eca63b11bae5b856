"""Two ways to compute one operation, timed in turns in one process."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from memory import host_extra_peak
from pytest_benchmark.fixture import BenchmarkFixture
from timed import Timed
from torch import Tensor

from semiseg_kernels import use_backend

PARTS = ("forward", "step")


class Form(Timed):
    """An operation on one backend."""

    def __init__(self, backend: str, operation: Callable[..., Tensor], arguments: Sequence[Tensor]) -> None:
        super().__init__()
        self.backend, self.operation, self.arguments = backend, operation, arguments
        self.cotangent = torch.ones_like(self.forward())

    def forward(self) -> Tensor:
        with use_backend(self.backend):
            return self.operation(*self.arguments)

    def backward(self, results: Tensor) -> tuple[Tensor, ...]:
        differentiated = [argument for argument in self.arguments if argument.requires_grad]
        return torch.autograd.grad(results, differentiated, self.cotangent)

    def figures(self, part: str) -> dict[str, float]:
        """Milliseconds, and megabytes at the peak beyond the inputs, results and gradients included."""
        call = {"forward": self.forward, "step": self.forward_and_backward}[part]
        return {
            "median_ms": 1e3 * statistics.median(self.seconds[part]),
            "min_ms": 1e3 * min(self.seconds[part]),
            # The least of a few, as the heap's holes may or may not fit.
            "extra_peak_mb": min(host_extra_peak(call)[0] for _ in range(5)) / 1e6,
        }


def compare(
    benchmark: BenchmarkFixture,
    forms: Mapping[str, Form],  # two, which are to agree
    rounds: int,
    row: Mapping[str, Any],  # what the rows say beside the figures
    record: list[dict[str, Any]],
) -> None:
    """Time both forms in turns, and add a row for each part."""
    first, second = forms.values()
    torch.testing.assert_close(first.forward(), second.forward(), rtol=1e-4, atol=1e-4)
    for form in forms.values():
        form.step()
        form.discard_times()
    benchmark.pedantic(first.step, setup=second.step, rounds=rounds)
    for part in PARTS:
        contestants = {name: form.figures(part) for name, form in forms.items()}
        record.append({**row, "part": part, "rounds": rounds, "contestants": contestants})
        benchmark.extra_info[part] = record[-1]
