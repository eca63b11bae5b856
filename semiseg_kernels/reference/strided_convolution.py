"""References of the strided convolution and its transposed: PyTorch's own, and their ReLU."""

from torch import Tensor
from torch.nn.functional import conv_transpose2d, conv_transpose3d

from .common import activate, convolve


def strided_convolution(
    x: Tensor,  # [B, I, *2S]
    weight: Tensor,  # [O, I, *2]
    bias: Tensor | None = None,  # [O]
    negative_slope: float = 1.0,
) -> Tensor:  # [B, O, *S]
    return activate(convolve(x, weight, bias, stride=2), negative_slope, inplace=True)


def transposed_convolution(
    x: Tensor,  # [B, I, *S]
    weight: Tensor,  # [I, O, *2]
    bias: Tensor | None = None,  # [O]
    negative_slope: float = 1.0,
    added: Tensor | None = None,  # [B, O, *2S]
) -> Tensor:  # [B, O, *2S]
    transposed = conv_transpose3d if x.dim() == 5 else conv_transpose2d
    y = transposed(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype), stride=2)
    y = activate(y, negative_slope, inplace=True)
    return y if added is None else y + added
