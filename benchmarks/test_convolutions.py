"""The convolutions of the networks beside PyTorch's, on activations as of a mix of MPER on LA and of a batch on ACDC.

Both run in one process, in turns, with the same allocator settings, float32, channels last; a step computes both gradients, of
the first layer that of the weight.
"""

from typing import Any

import pytest
import torch
from forms import Form, compare
from pytest_benchmark.fixture import BenchmarkFixture

import semiseg_kernels

ROUNDS = 7
FORMS = {"own": "cpu", "PyTorch": "reference"}
# Operation, channels read and written, batch and sides of what is read.
CALLS = {
    "full": [
        ("convolution", 1, 16, 2, (112, 112, 80)),
        ("convolution", 16, 16, 2, (112, 112, 80)),
        ("convolution", 32, 32, 2, (56, 56, 40)),
        ("convolution", 64, 64, 2, (28, 28, 20)),
        ("convolution", 128, 128, 2, (14, 14, 10)),
        ("strided_convolution", 16, 32, 2, (112, 112, 80)),
        ("strided_convolution", 32, 64, 2, (56, 56, 40)),
        ("strided_convolution", 64, 128, 2, (28, 28, 20)),
        ("transposed_convolution", 32, 16, 2, (56, 56, 40)),
        ("transposed_convolution", 64, 32, 2, (28, 28, 20)),
        ("transposed_convolution", 128, 64, 2, (14, 14, 10)),
        ("convolution", 1, 16, 12, (256, 256)),
        ("convolution", 16, 16, 12, (256, 256)),
        ("convolution", 64, 64, 12, (64, 64)),
        ("transposed_convolution", 64, 32, 12, (64, 64)),
    ],
    "tiny": [
        ("convolution", 1, 16, 2, (4, 6, 5)),
        ("convolution", 16, 16, 2, (4, 6, 5)),
        ("strided_convolution", 16, 32, 2, (4, 6, 8)),
        ("transposed_convolution", 32, 16, 2, (3, 4)),
    ],
}
SIDE = {"convolution": 3, "strided_convolution": 2, "transposed_convolution": 2}


@pytest.mark.parametrize("call", range(len(CALLS["full"])))
def test_convolutions(
    benchmark: BenchmarkFixture, call: int, size: str, allocator: str, record: list[dict[str, Any]]
) -> None:
    if call >= len(CALLS[size]):
        pytest.skip(f"there are {len(CALLS[size])} calls of this size")
    operation, read, written, batch, sides = CALLS[size][call]
    torch.manual_seed(0)
    channels = (read, written) if operation == "transposed_convolution" else (written, read)
    taps = [SIDE[operation]] * len(sides)
    memory_format = torch.channels_last_3d if len(sides) == 3 else torch.channels_last
    scale = (read * torch.Size(taps).numel()) ** -0.5
    x, weight = (
        tensor.contiguous(memory_format=memory_format)
        for tensor in (torch.randn(batch, read, *sides), scale * torch.randn(*channels, *taps))
    )
    arguments = [x.requires_grad_(read > 1), weight.requires_grad_()]
    forms = {
        name: Form(backend, getattr(semiseg_kernels, operation), arguments) for name, backend in FORMS.items()
    }
    row = {
        "operation": operation,
        "batch": batch,
        "spatial": sides,
        "channels": (read, written),
        "allocator": allocator,
    }
    compare(benchmark, forms, ROUNDS, row, record)
