"""Twice the sides of an image, by linear interpolation."""

from typing import Any

import torch
from torch import Tensor

from . import backends, checks, reference
from .convolution import channels_last
from .differentiation import once_differentiable
from .layouts import is_channels_last


def linear_upsampling(
    x: Tensor,  # [B, C, *S], *S 2 or 3 axes
) -> Tensor:  # [B, C, *2S]
    """Bilinear or trilinear interpolation to twice the sides, as `torch.nn.Upsample` without aligned corners.

        along every axis  y[2 i] = 1/4 x[i - 1] + 3/4 x[i],  y[2 i + 1] = 3/4 x[i] + 1/4 x[i + 1],  with ends repeated

    x: float32, bfloat16 or float16 (float64 runs on the reference). Contiguous and channels-last are read in place, other
        strides are copied first.

    The result has x's dtype and, from a kernel, its memory format; a kernel computes in float32, also under autocast. On the
    CPU PyTorch interpolates. Differentiable in x. Raises ValueError on wrong shapes or dtypes.
    """
    checks.check_voxels("x", x)
    if x.dim() == 3 or 0 in x.shape[2:]:
        raise ValueError(
            f"x has shape {list(x.shape)}, accepted are 2 or 3 axes of voxels, sides of at least 1"
        )
    if backends.cpu_is_requested():
        return reference.linear_upsampling(x)
    backend = backends.select("linear_upsampling", x, 1, 1, x.shape[1])
    if backend == "reference":
        return reference.linear_upsampling(x)
    return _LinearUpsampling.apply(x, backend)


class _LinearUpsampling(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, backend: str) -> Tensor:
        ctx.channels_last, ctx.backend = only_channels_last(x), backend
        return torch.ops.semiseg_kernels.linear_upsampling_forward(x, backend)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor, None]:
        raw = torch.ops.semiseg_kernels.linear_upsampling_backward
        return raw(grad_y, ctx.channels_last, ctx.backend), None


def only_channels_last(x: Tensor) -> bool:
    return not x.is_contiguous() and is_channels_last(x)


def doubled(
    x: Tensor,  # [B, C, *S]
) -> Tensor:  # [B, C, *2S], uninitialised
    return _resized(x, [2 * side for side in x.shape[2:]], only_channels_last(x))


def halved(
    y: Tensor,  # [B, C, *2S]
    channels_last: bool,
) -> Tensor:  # [B, C, *S], uninitialised
    return _resized(y, [side // 2 for side in y.shape[2:]], channels_last)


def _resized(x: Tensor, sides: list[int], last: bool) -> Tensor:
    memory_format = channels_last(x.dim()) if last else torch.contiguous_format
    shape = (*x.shape[:2], *sides)
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=memory_format)


def _fake_forward(x: Tensor, backend: str) -> Tensor:
    return doubled(x)


def _fake_backward(grad_y: Tensor, channels_last: bool, backend: str) -> Tensor:
    return halved(grad_y, channels_last)


backends.register("linear_upsampling_forward(Tensor x, str backend) -> Tensor", _fake_forward)
backends.register(
    "linear_upsampling_backward(Tensor grad_y, bool channels_last, str backend) -> Tensor", _fake_backward
)
