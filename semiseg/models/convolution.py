"""The convolutions of the networks: of side 3, and those that halve and double the sides of an image."""

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from semiseg_kernels import convolution, strided_convolution, transposed_convolution
from semiseg_kernels.convolution import channels_last


class ActivatedConvolution(_ConvNd):
    """A convolution that computes the ReLU behind it too, once it is told its slope."""

    negative_slope = 1.0  # no ReLU

    def in_format_of_weight(self, x: Tensor) -> Tensor:
        """x as the layers expect it: a batch of images is contiguous, and so, of a single one, are some of PyTorch's
        results."""
        return x.contiguous(memory_format=channels_last(x.dim())) if self.weight.stride(1) == 1 else x


class _Convolution(ActivatedConvolution):
    """A convolution of side 3, stride 1 and padding 1 that `convolution` computes."""

    def forward(
        self,
        x: Tensor,  # [B, in_channels, *S]
    ) -> Tensor:  # [B, out_channels, *S]
        x = self.in_format_of_weight(x)
        return self.in_format_of_weight(convolution(x, self.weight, self.bias, self.negative_slope))


class Convolution2d(_Convolution, nn.Conv2d):
    def __init__(self, in_channels: int, out_channels: int, bias: bool = True) -> None:
        super().__init__(in_channels, out_channels, kernel_size=3, padding=1, bias=bias)


class Convolution3d(_Convolution, nn.Conv3d):
    def __init__(self, in_channels: int, out_channels: int, bias: bool = True) -> None:
        super().__init__(in_channels, out_channels, kernel_size=3, padding=1, bias=bias)


class StridedConvolution3d(ActivatedConvolution, nn.Conv3d):
    """A convolution of side 2 and stride 2 that `strided_convolution` computes."""

    def __init__(self, in_channels: int, out_channels: int, bias: bool = True) -> None:
        super().__init__(in_channels, out_channels, kernel_size=2, stride=2, bias=bias)

    def forward(
        self,
        x: Tensor,  # [B, in_channels, *2S]
    ) -> Tensor:  # [B, out_channels, *S]
        return self.in_format_of_weight(
            strided_convolution(x, self.weight, self.bias, self.negative_slope)
        )


class _TransposedConvolution(ActivatedConvolution):
    """A transposed convolution of side 2 and stride 2 that `transposed_convolution` computes."""

    def forward(
        self,
        x: Tensor,  # [B, in_channels, *S]
        added: Tensor | None = None,  # [B, out_channels, *2S], to the result
    ) -> Tensor:  # [B, out_channels, *2S]
        return self.in_format_of_weight(
            transposed_convolution(x, self.weight, self.bias, self.negative_slope, added)
        )


class TransposedConvolution2d(_TransposedConvolution, nn.ConvTranspose2d):  # type: ignore[misc]  # no output_size
    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, kernel_size=2, stride=2)


class TransposedConvolution3d(_TransposedConvolution, nn.ConvTranspose3d):  # type: ignore[misc]  # no output_size
    def __init__(self, in_channels: int, out_channels: int, bias: bool = True) -> None:
        super().__init__(in_channels, out_channels, kernel_size=2, stride=2, bias=bias)
