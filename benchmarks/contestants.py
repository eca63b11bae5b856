"""The ways to compute an operation: a kernel, the reference as it is and compiled, and the matrix product."""

import dataclasses
import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from memory import device_extra_peak, host_extra_peak, page_faults
from timed import Timed
from torch import Tensor
from workloads import Operation, Results, Traffic

from semiseg_kernels import use_backend

MEGABYTE = 1e6
# A voxel within rounding of a border between two prototypes may go either way, and its gradient and its share of the
# sums with it. Allowed are, after arithmetic in float32 and after arithmetic in a narrower dtype:
BORDER_VOXELS = {True: 1e-4, False: 5e-2}  # the share of such voxels
LOSS_ERROR = {True: 1e-3, False: 5e-2}  # the relative error of a mean over all voxels
CLUSTER_ERROR = {True: 5e-3, False: 0.2}  # the relative error of sums over a cluster's voxels
# A gradient of parameters sums over all voxels too. In a narrow dtype thousands of them have the same value, and all of
# one value that is 0 before a ReLU, within rounding, go the same way.
PARAMETER_ERROR = {True: 5e-3, False: 5e-2}  # the relative error after inputs in float32, and in a narrower dtype


class Contestant(Timed):
    """One way to compute an operation, and the page faults of each call."""

    def __init__(
        self,
        operation: Operation,
        backend: str,
        compiler: str | None = None,
        mode: str | None = None,
        gemm: Callable[[Tensor], Results] | None = None,
    ) -> None:
        super().__init__()
        self.x = operation.x.detach().requires_grad_(operation.differentiable > 0)
        self.inputs = (self.x, *operation.trained)
        self.differentiable = operation.differentiable
        self.backend = backend
        self.arithmetic = self.x.dtype if gemm is not None else torch.float32
        self.function: Callable[[Tensor], Results] = gemm or operation.function
        if compiler is not None:
            self.function = torch.compile(
                operation.function, fullgraph=True, dynamic=False, backend=compiler, mode=mode
            )
        generator = torch.Generator(self.x.device).manual_seed(0)
        results = self.forward()
        self.cotangents = [
            torch.randn(result.shape, generator=generator, device=self.x.device).to(result.dtype)
            for result in results[: self.differentiable]
        ]
        self.faults: list[int] = []

    def forward(self) -> Results:
        with use_backend(self.backend):
            return self.function(self.x)

    def backward(self, results: Results) -> Results:
        if not self.differentiable:
            return ()
        return torch.autograd.grad(results[: self.differentiable], self.inputs, self.cotangents)

    def step(self) -> None:
        faults = page_faults()
        super().step()
        self.faults.append(page_faults() - faults)

    def discard_times(self) -> None:
        super().discard_times()
        self.faults.clear()

    def memory(self) -> dict[str, float]:
        """Extra peak memory of each part in bytes, results and gradient included."""
        extra_peak = device_extra_peak if self.x.is_cuda else host_extra_peak
        step, _ = extra_peak(self.forward_and_backward)
        forward, results = extra_peak(self.forward)
        backward, _ = extra_peak(functools.partial(self.backward, results))
        return {"forward": forward, "backward": backward, "step": step}


def assert_agreement(contestant: Contestant, reference: Contestant) -> None:
    """Raise AssertionError unless both compute the same, voxels at the border of two prototypes excepted."""
    actual, expected = contestant.forward(), reference.forward()
    gradients = list(zip(contestant.backward(actual), reference.backward(expected), strict=True))
    for a, b in zip(actual, expected, strict=True):
        assert_mostly_close(a.detach(), b.detach(), contestant.arithmetic)
    for a, b in gradients[:1]:
        assert_mostly_close(a, b, contestant.arithmetic)
    for a, b in gradients[1:]:
        assert_close_in_norm(a, b, PARAMETER_ERROR[contestant.x.dtype == torch.float32])


def assert_mostly_close(actual: Tensor, expected: Tensor, arithmetic: torch.dtype = torch.float32) -> None:
    is_single = arithmetic == torch.float32
    if expected.dim() <= 3:  # [R] losses of the regions, [C, K] or [C, K, d] sums of the clusters
        assert_close_in_norm(actual, expected, (LOSS_ERROR if expected.dim() <= 1 else CLUSTER_ERROR)[is_single])
        return
    if not expected.is_floating_point():
        different = actual != expected
    else:
        rounding = 2 * max(torch.finfo(dtype).eps for dtype in (expected.dtype, arithmetic))
        close = (actual - expected).abs() <= max(rounding, 1e-3) * expected.abs().max()
        different = ~close  # a NaN is
    share = different.double().mean().item()
    assert share <= BORDER_VOXELS[is_single], (
        f"the kernel differs from the reference in {share:.2e} of the values"
    )


def assert_close_in_norm(actual: Tensor, expected: Tensor, allowed: float) -> None:
    error = (torch.linalg.vector_norm(actual - expected) / torch.linalg.vector_norm(expected)).item()
    assert error <= allowed, f"the kernel differs from the reference by {error:.2e} of its norm"


def plain_accesses(values: Tensor) -> dict[str, Callable[[], Any]]:
    """The plain read and the plain write of a tensor, whose pace bounds what any operation can reach."""
    return {"read": values.sum, "write": lambda: values.fill_(1.0)}


def seconds_of(function: Callable[[], Any]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def summarise(
    contestants: dict[str, Contestant],
    traffic: dict[str, Traffic],
    seconds_per_byte: dict[str, list[float]],
) -> list[dict[str, Any]]:
    """A row for each part of the operation; ratios are of the medians of contestants that took turns."""
    read, write = (statistics.median(seconds_per_byte[name]) for name in ("read", "write"))
    memory = {name: contestant.memory() for name, contestant in contestants.items()}
    parts = ("forward", "backward", "step") if contestants["cpu"].differentiable else ("forward",)
    rows = []
    for part in parts:
        times = {
            name: statistics.median(contestant.seconds[part]) for name, contestant in contestants.items()
        }
        compulsory = traffic[part].read * read + traffic[part].written * write
        rows.append(
            {
                "part": part,
                "rounds": len(contestants["cpu"].seconds[part]),
                "compulsory_bytes": dataclasses.asdict(traffic[part]),
                "read_gb_s": 1e-9 / read,
                "write_gb_s": 1e-9 / write,
                "contestants": {
                    name: {
                        "median_ms": 1e3 * times[name],
                        "min_ms": 1e3 * min(contestant.seconds[part]),
                        "over_compulsory": times[name] / compulsory,
                        "over_cpu": times[name] / times["cpu"],
                        "extra_peak_mb": memory[name][part] / MEGABYTE,
                        "page_faults_of_a_step": statistics.median(contestant.faults),
                    }
                    for name, contestant in contestants.items()
                },
            }
        )
    return rows
