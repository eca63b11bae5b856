"""The convolution that most layers of a network are: of side 3, keeping the sides of the image."""

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from semiseg_kernels import convolution


class _Convolution(_ConvNd):
    """A convolution of side 3, stride 1 and padding 1 that `convolution` computes."""

    def forward(
        self,
        x: Tensor,  # [B, in_channels, *S]
    ) -> Tensor:  # [B, out_channels, *S]
        return convolution(x, self.weight, self.bias)


class Convolution2d(_Convolution, nn.Conv2d):
    def __init__(self, in_channels: int, out_channels: int, bias: bool = True) -> None:
        super().__init__(in_channels, out_channels, kernel_size=3, padding=1, bias=bias)


class Convolution3d(_Convolution, nn.Conv3d):
    def __init__(self, in_channels: int, out_channels: int, bias: bool = True) -> None:
        super().__init__(in_channels, out_channels, kernel_size=3, padding=1, bias=bias)
