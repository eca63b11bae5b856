"""The prompt convolution, folded beside concatenated, on inputs as at the bottleneck of VCLIPSeg's network.

Both run in one process, in turns, with the same allocator settings; a step computes the gradients of all five tensors.
"""

import functools
from typing import Any

import pytest
import torch
from forms import Form, compare
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from semiseg_kernels import prompt_conv

ROUNDS = 15
FORMS = {"folded": "auto", "concatenated": "reference"}
SIZES = {"full": (4, 256, ((7, 7, 5), (14, 14, 10))), "tiny": (2, 8, ((3, 3, 2), (5, 4, 3)))}
KERNEL = (3, 3, 3)


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
    operation = functools.partial(prompt_conv, padding=1)
    forms = {name: Form(backend, operation, arguments) for name, backend in FORMS.items()}
    row = {
        "operation": "prompt_conv",
        "batch": batch,
        "spatial": grids[grid],
        "channels": channels,
        "num_classes": num_classes,
        "kernel": KERNEL,
        "allocator": allocator,
    }
    compare(benchmark, forms, ROUNDS, row, record)
