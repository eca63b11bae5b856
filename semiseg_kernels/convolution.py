"""The convolution of side 3 that keeps an image's sides, with fewer multiplications."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import backends, checks, reference
from .differentiation import once_differentiable
from .fixed_weights import is_fixed
from .layouts import is_channels_last

CHANNEL_MULTIPLE = 16  # other numbers of channels are padded
# For fewer voxels, transforming the weight, and its gradient, takes longer than what it spares.
FEWEST_VOXELS = {2: 1024, 3: 2048}  # by axes
FEWEST_WITHOUT_GRADIENTS = 768


def convolution(
    x: Tensor,  # [B, I, *S], *S 2 or 3 axes
    weight: Tensor,  # [O, I, *3]
    bias: Tensor | None = None,  # [O]
    negative_slope: float = 1.0,  # of a ReLU of the result; 1 leaves it out
) -> Tensor:  # [B, O, *S]
    """Convolution with a kernel of side 3, stride 1 and padding 1, as `torch.nn.functional.conv3d` and `conv2d`.

        y[b, o, s] = bias[o] + sum_i sum_t weight[o, i, t] x[b, i, s + t],  t in {-1, 0, 1}^axes, x = 0 outside
        then max(y, 0) + negative_slope min(y, 0)

    x: float32, bfloat16 or float16 (float64 runs on the reference).
    weight, bias: x's dtype, or any under autocast.

    The C++ kernel computes in float32, by Winograd's transforms of tiles of results:

    - Arithmetic: F(4, 3) along the last axis, F(2, 3) along the others. A pair of channels and a tile of 2 x 2 x 4 voxels
      take 96 multiplications instead of 432 (2D, 2 x 4: 24 instead of 72). From 32 channels read on (2D: 96), where it
      takes fewer, F(4, 3) along the last two axes: for a tile of 2 x 4 x 4 voxels 144 instead of 864 (2D, 4 x 4: 36
      instead of 144). Planes that far fewer tiles cover so, as of 7 x 5 voxels, are taken with the two axes
      exchanged. Fewer than 16 channels read are multiplied without transforms.
    - Accuracy: that of float32, with errors of up to 2 times PyTorch's (up to 6 times for a single image, which PyTorch
      sums another way). A NaN or an infinity in x makes all results of its tile NaN.
    - When it runs: when it is forced, and else where it is faster, which is on the CPU, in float32 without autocast, for
      channels-last x (or weight, where x has one channel) and channels in multiples of 16 (x that needs no gradient may
      have fewer than 16), from 2048 voxels of volumes or 1024 of images on. Without gradients 768 voxels are enough,
      and with a weight that `fix_weight` was told of, outside torch.compile, any number. Else PyTorch convolves.

    Differentiable in x, weight and bias. Raises ValueError on wrong shapes or dtypes, or a slope outside 0..1.
    Source: A. Lavin, S. Gray, Fast Algorithms for Convolutional Neural Networks, CVPR 2016.
    """
    checks.check_voxels("x", x)
    check_side(x, weight, 3)
    checks.check_convolution(weight, bias, 1, x, x.shape[1])
    checks.check_fraction("negative_slope", negative_slope)
    gradients = needs_gradient(x, weight, bias)
    fewest = FEWEST_VOXELS[x.dim() - 2] if gradients else FEWEST_WITHOUT_GRADIENTS
    if not gradients and is_fixed(weight):
        fewest = 0
    narrow = x.shape[1] < CHANNEL_MULTIPLE and not needs_gradient(x)
    if x.device.type != "cpu" or (backends.is_automatic() and not kernel_pays(x, weight, fewest, narrow)):
        return reference.convolution(x, weight, bias, negative_slope)
    backend = backends.select("convolution", x, 1, 1, max(weight.shape[:2]))
    if backend == "reference":
        return reference.convolution(x, weight, bias, negative_slope)
    return KernelConvolution.apply(x, weight, bias, negative_slope, backend, "convolution")


def check_side(x: Tensor, weight: Tensor, side: int) -> None:
    if x.dim() == 3:
        raise ValueError(f"x has shape {list(x.shape)}, accepted are 2 or 3 axes of voxels")
    if 0 in x.shape[2:]:
        raise ValueError(f"x has shape {list(x.shape)}, accepted are sides of at least 1")
    checks.check_tensor("weight", weight)
    if weight.dim() == x.dim() and weight.shape[2:] != (side,) * (x.dim() - 2):
        raise ValueError(f"weight has shape {list(weight.shape)}, accepted are kernels of side {side}")


def kernel_pays(
    x: Tensor,  # [B, *, *S]
    weight: Tensor,  # [*, *, *k]
    fewest: int,  # voxels that pay for what is done with the weight first
    narrow: bool = False,  # few channels are read, which need not be padded
) -> bool:
    """Whether the kernel is faster than PyTorch's convolution, which has units for bfloat16 where the kernel has none."""
    if x.dtype != torch.float32 or torch.is_autocast_enabled("cpu"):
        return False
    padded = weight.shape[:1] if narrow else weight.shape[:2]
    # An image of one channel has no memory format of its own.
    last = weight.stride(1) == 1 if x.shape[1] == 1 else is_channels_last(x)
    if not last or any(channels % CHANNEL_MULTIPLE for channels in padded):
        return False
    # Last, so that a graph exported for any number of voxels is asked how many there are only where that decides.
    return x.numel() // x.shape[1] >= fewest


def needs_gradient(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


class RawOperations(NamedTuple):
    """What a convolution computes with on its kernel."""

    # x, weight, bias, slope of the ReLU, backend
    forward: Callable[[Tensor, Tensor, Tensor | None, float, str], Tensor]
    backward: Callable[[Tensor, Tensor, str], Tensor]  # gradient of the result, weight, backend
    weight: Callable[[Tensor, Tensor, Tensor, str], Tensor]  # gradient of the result, x, weight, backend


_raw = torch.ops.semiseg_kernels
RAW_OPERATIONS = {
    "convolution": RawOperations(
        lambda *arguments: _raw.convolution_forward(*arguments),
        lambda grad_y, weight, backend: _raw.convolution_backward(grad_y, weight, backend),
        lambda grad_y, x, weight, backend: _raw.convolution_weight(grad_y, x, weight, backend),
    ),
    "strided_convolution": RawOperations(
        lambda *arguments: _raw.strided_convolution_forward(*arguments),
        lambda grad_y, weight, backend: _raw.strided_convolution_transposed(
            grad_y, weight, None, 1.0, None, backend
        ),
        lambda grad_y, x, weight, backend: _raw.strided_convolution_weight(x, grad_y, weight, backend),
    ),
    "transposed_convolution": RawOperations(
        lambda x, weight, bias, slope, backend: _raw.strided_convolution_transposed(
            x, weight, bias, slope, None, backend
        ),
        lambda grad_y, weight, backend: _raw.strided_convolution_forward(grad_y, weight, None, 1.0, backend),
        lambda grad_y, x, weight, backend: _raw.strided_convolution_weight(grad_y, x, weight, backend),
    ),
}


class KernelConvolution(torch.autograd.Function):
    """A convolution by the raw operations of that name, with the gradients that are needed."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        negative_slope: float,
        backend: str,
        operation: str,
    ) -> Tensor:
        y = RAW_OPERATIONS[operation].forward(x, weight, bias, negative_slope, backend)
        # Without ReLU the result is not kept, so that it may be changed in place.
        ctx.save_for_backward(x, weight, None if negative_slope == 1 else y)
        ctx.negative_slope, ctx.backend, ctx.operation = negative_slope, backend, operation
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, y = ctx.saved_tensors
        if y is not None:
            # 0 where the slope is 0, also of an infinity.
            off = ctx.negative_slope * grad_y if ctx.negative_slope else 0.0
            grad_y = torch.where(y > 0, grad_y, off)
        raw = RAW_OPERATIONS[ctx.operation]
        needs_x, needs_weight, needs_bias, *_ = ctx.needs_input_grad
        grad_x = raw.backward(grad_y, weight, ctx.backend) if needs_x else None
        grad_weight = raw.weight(grad_y, x, weight, ctx.backend) if needs_weight else None
        grad_bias = grad_y.sum((0, *range(2, grad_y.dim()))) if needs_bias else None
        return grad_x, grad_weight, grad_bias, None, None, None


def channels_last(dimensions: int) -> torch.memory_format:
    return torch.channels_last_3d if dimensions == 5 else torch.channels_last


def fake_result(x: Tensor, channels: int, sides: Sequence[int | torch.SymInt]) -> Tensor:
    shape = (x.shape[0], channels, *sides)
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=channels_last(x.dim()))


def _fake_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, negative_slope: float, backend: str
) -> Tensor:
    return fake_result(x, weight.shape[0], x.shape[2:])


def _fake_backward(grad_y: Tensor, weight: Tensor, backend: str) -> Tensor:
    return fake_result(grad_y, weight.shape[1], grad_y.shape[2:])


def _fake_weight(grad_y: Tensor, x: Tensor, weight: Tensor, backend: str) -> Tensor:
    return torch.empty_like(weight)


backends.register(
    "convolution_forward(Tensor x, Tensor weight, Tensor? bias, float negative_slope, str backend) -> Tensor",
    _fake_forward,
)
backends.register("convolution_backward(Tensor grad_y, Tensor weight, str backend) -> Tensor", _fake_backward)
backends.register(
    "convolution_weight(Tensor grad_y, Tensor x, Tensor weight, str backend) -> Tensor", _fake_weight
)
