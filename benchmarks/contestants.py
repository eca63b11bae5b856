"""The ways to compute an operation: the kernel, the reference as it is, and the reference compiled."""

import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from memory import extra_peak, page_faults
from torch import Tensor
from workloads import Operation, Results

from semiseg_kernels import use_backend

MEGABYTE = 1e6
# A voxel within rounding of a border between two prototypes may go either way, and its gradient with it.
BORDER_VOXELS = 1e-4


class Contestant:
    """One way to compute an operation, and how long each call of it took."""

    def __init__(self, operation: Operation, backend: str, compiler: str | None = None) -> None:
        self.x = operation.x.detach().requires_grad_(operation.differentiable > 0)
        self.differentiable = operation.differentiable
        self.backend = backend
        self.function: Callable[[Tensor], Results] = operation.function
        if compiler is not None:
            self.function = torch.compile(operation.function, fullgraph=True, dynamic=False, backend=compiler)
        generator = torch.Generator().manual_seed(0)
        results = self.forward()
        self.cotangents = [
            torch.randn(result.shape, generator=generator).to(result.dtype)
            for result in results[: self.differentiable]
        ]
        self.seconds: dict[str, list[float]] = {"forward": [], "backward": [], "step": []}
        self.faults: list[int] = []

    def forward(self) -> Results:
        with use_backend(self.backend):
            return self.function(self.x)

    def backward(self, results: Results) -> Tensor | None:
        if not self.differentiable:
            return None
        return torch.autograd.grad(results[: self.differentiable], self.x, self.cotangents)[0]

    def step(self) -> None:
        """Forward and backward once, timed."""
        faults, start = page_faults(), time.perf_counter()
        results = self.forward()
        middle = time.perf_counter()
        gradient = self.backward(results)
        end = time.perf_counter()
        self.faults.append(page_faults() - faults)
        for name, seconds in (("forward", middle - start), ("backward", end - middle), ("step", end - start)):
            self.seconds[name].append(seconds)
        del results, gradient

    def discard_times(self) -> None:
        self.faults.clear()
        for seconds in self.seconds.values():
            seconds.clear()

    def memory(self) -> dict[str, float]:
        """Extra peak memory of each part in bytes, results and gradient included."""
        step, _ = extra_peak(lambda: self.backward(self.forward()))
        forward, results = extra_peak(self.forward)
        backward, _ = extra_peak(functools.partial(self.backward, results))
        return {"forward": forward, "backward": backward, "step": step}


def assert_agreement(contestant: Contestant, reference: Contestant) -> None:
    """Raise AssertionError unless both compute the same, voxels at the border of two prototypes excepted."""
    actual, expected = contestant.forward(), reference.forward()
    gradients = contestant.backward(actual), reference.backward(expected)
    for a, b in zip(actual, expected, strict=True):
        assert_mostly_close(a.detach(), b.detach())
    if gradients[0] is not None and gradients[1] is not None:
        assert_mostly_close(*gradients)


def assert_mostly_close(actual: Tensor, expected: Tensor) -> None:
    if expected.dim() <= 2:  # sums over the voxels of a region or a cluster
        torch.testing.assert_close(actual, expected, rtol=1e-3, atol=0)
        return
    if not expected.is_floating_point():
        different = actual != expected
    else:
        different = (actual - expected).abs() > 1e-3 * expected.abs().max()
    share = different.double().mean().item()
    assert share <= BORDER_VOXELS, f"the kernel differs from the reference in {share:.2e} of the values"


def traffic(x: Tensor) -> dict[str, Callable[[], Any]]:
    """The plain read and the plain write of a tensor, which bound what any operation on it can reach."""
    written = torch.empty_like(x)
    return {"read": x.sum, "write": lambda: written.fill_(1.0)}


def seconds_of(function: Callable[[], Any]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def summarise(
    contestants: dict[str, Contestant],
    traffic_seconds: dict[str, list[float]],
) -> list[dict[str, Any]]:
    """A row for each part of the operation; ratios are of the medians of contestants that took turns."""
    read, write = (statistics.median(traffic_seconds[name]) for name in ("read", "write"))
    compulsory = {"forward": read, "backward": read + write, "step": 2 * read + write}
    memory = {name: contestant.memory() for name, contestant in contestants.items()}
    parts = ("forward", "backward", "step") if contestants["cpu"].differentiable else ("forward",)
    rows = []
    for part in parts:
        times = {
            name: statistics.median(contestant.seconds[part]) for name, contestant in contestants.items()
        }
        rows.append(
            {
                "part": part,
                "rounds": len(contestants["cpu"].seconds[part]),
                "read_ms": 1e3 * read,
                "write_ms": 1e3 * write,
                "contestants": {
                    name: {
                        "median_ms": 1e3 * times[name],
                        "min_ms": 1e3 * min(contestant.seconds[part]),
                        "over_read": times[name] / read,
                        "over_compulsory": times[name] / compulsory[part],
                        "over_cpu": times[name] / times["cpu"],
                        "extra_peak_mb": memory[name][part] / MEGABYTE,
                        "page_faults_of_a_step": statistics.median(contestant.faults),
                    }
                    for name, contestant in contestants.items()
                },
            }
        )
    return rows
