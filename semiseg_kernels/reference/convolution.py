"""Reference of the convolution: PyTorch's own, and its ReLU."""

from torch import Tensor

from .common import activate, convolve


def convolution(
    x: Tensor,  # [B, I, *S]
    weight: Tensor,  # [O, I, *3]
    bias: Tensor | None = None,  # [O]
    negative_slope: float = 1.0,
) -> Tensor:  # [B, O, *S]
    return activate(convolve(x, weight, bias, padding=1), negative_slope, inplace=True)
