"""The prompt convolution, folded beside concatenated, on inputs as at the bottleneck of VCLIPSeg's network.

Both run in one process, in turns, with the same allocator settings; a step computes the gradients of all five tensors.
"""

import statistics
import time
from typing import Any

import pytest
import torch
from memory import host_extra_peak
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from semiseg_kernels import prompt_conv, use_backend

ROUNDS = 15
FORMS = {"folded": "auto", "concatenated": "reference"}
SIZES = {"full": (4, 256, ((7, 7, 5), (14, 14, 10))), "tiny": (2, 8, ((3, 3, 2), (5, 4, 3)))}
KERNEL = (3, 3, 3)


class Form:
    """One way to compute it, and how long each call of it took."""

    def __init__(self, backend: str, arguments: list[Tensor]) -> None:
        self.backend = backend
        self.arguments = arguments
        self.cotangent = torch.ones_like(self.forward())
        self.seconds: dict[str, list[float]] = {"forward": [], "step": []}

    def forward(self) -> Tensor:
        with use_backend(self.backend):
            return prompt_conv(*self.arguments, padding=1)

    def backward(self, result: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(result, self.arguments, self.cotangent)

    def forward_and_backward(self) -> tuple[Tensor, ...]:
        return self.backward(self.forward())

    def step(self) -> None:
        """Forward and backward once, timed."""
        start = time.perf_counter()
        result = self.forward()
        middle = time.perf_counter()
        gradients = self.backward(result)
        end = time.perf_counter()
        self.seconds["forward"].append(middle - start)
        self.seconds["step"].append(end - start)
        del result, gradients

    def figures(self, part: str) -> dict[str, float]:
        """Milliseconds, and megabytes at the peak beyond the inputs, results and gradients included."""
        call = {"forward": self.forward, "step": self.forward_and_backward}[part]
        return {
            "median_ms": 1e3 * statistics.median(self.seconds[part]),
            "min_ms": 1e3 * min(self.seconds[part]),
            # The least of a few, as the heap's holes may or may not fit.
            "extra_peak_mb": min(host_extra_peak(call)[0] for _ in range(5)) / 1e6,
        }


def make_arguments(batch: int, channels: int, spatial: tuple[int, ...], num_classes: int) -> list[Tensor]:
    """Features, logits, text, weight and bias."""
    torch.manual_seed(0)
    shapes = {
        "features": (batch, channels, *spatial),
        "logits": (batch, num_classes, *spatial),
        "text": (num_classes, channels),
        "weight": (channels, 2 * channels, *KERNEL),
        "bias": (channels,),
    }
    scale = {"weight": (2 * channels * torch.Size(KERNEL).numel()) ** -0.5}
    return [(scale.get(name, 1) * torch.randn(shape)).requires_grad_() for name, shape in shapes.items()]


@pytest.mark.parametrize("num_classes", [2, 14])
@pytest.mark.parametrize("grid", [0, 1], ids=["small", "large"])
def test_prompt_conv(
    benchmark: BenchmarkFixture,
    grid: int,
    num_classes: int,
    size: str,
    allocator: str,
    record: list[dict[str, Any]],
) -> None:
    batch, channels, grids = SIZES[size]
    arguments = make_arguments(batch, channels, grids[grid], num_classes)
    forms = {name: Form(backend, arguments) for name, backend in FORMS.items()}
    torch.testing.assert_close(*(form.forward() for form in forms.values()), rtol=1e-4, atol=1e-4)
    for form in forms.values():
        form.step()
        for seconds in form.seconds.values():
            seconds.clear()
    benchmark.pedantic(forms["folded"].step, setup=forms["concatenated"].step, rounds=ROUNDS)

    for part in ("forward", "step"):
        row = {
            "operation": "prompt_conv",
            "batch": batch,
            "spatial": grids[grid],
            "channels": channels,
            "num_classes": num_classes,
            "kernel": KERNEL,
            "allocator": allocator,
            "part": part,
            "rounds": ROUNDS,
            "contestants": {name: form.figures(part) for name, form in forms.items()},
        }
        record.append(row)
        benchmark.extra_info[part] = row
