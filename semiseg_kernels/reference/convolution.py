"""Reference of the convolution: PyTorch's own."""

from torch import Tensor

from .common import convolve


def convolution(
    x: Tensor,  # [B, I, *S]
    weight: Tensor,  # [O, I, *3]
    bias: Tensor | None = None,  # [O]
) -> Tensor:  # [B, O, *S]
    return convolve(x, weight, bias, padding=1)
