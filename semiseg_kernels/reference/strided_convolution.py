"""References of the strided convolution and its transposed: PyTorch's own."""

from torch import Tensor
from torch.nn.functional import conv2d, conv3d, conv_transpose2d, conv_transpose3d


def strided_convolution(
    x: Tensor,  # [B, I, *2S]
    weight: Tensor,  # [O, I, *2]
    bias: Tensor | None = None,  # [O]
) -> Tensor:  # [B, O, *S]
    return (conv3d if x.dim() == 5 else conv2d)(x, weight, bias, stride=2)


def transposed_convolution(
    x: Tensor,  # [B, I, *S]
    weight: Tensor,  # [I, O, *2]
    bias: Tensor | None = None,  # [O]
) -> Tensor:  # [B, O, *2S]
    return (conv_transpose3d if x.dim() == 5 else conv_transpose2d)(x, weight, bias, stride=2)
