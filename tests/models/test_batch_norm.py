"""The layer of batch normalisation and ReLU, against PyTorch's."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from semiseg.models.batch_norm import BatchNormReLU


@pytest.mark.parametrize("slope", [0.0, 0.01])
def test_running_statistics(slope):
    """As PyTorch moves them, and in evaluation they are what normalises."""
    x = 3 * torch.randn(4, 5, 6, 7, 8) + 2
    layer, plain = BatchNormReLU(5, slope), nn.BatchNorm3d(5)
    for _ in range(2):
        layer(x)
        plain(x)
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(layer.state_dict()[name], value)
    torch.testing.assert_close(layer.eval()(x), functional.leaky_relu(plain.eval()(x), slope))
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(layer.state_dict()[name], value)
