"""Launches of the convolution of side 3, and the layout that all kernels of convolutions share."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from semiseg_kernels.convolution import CHANNEL_MULTIPLE, channels_last
from semiseg_kernels.fixed_weights import made_of_weight
from semiseg_kernels.native.extension import address, launch


def forward(
    backend: str,
    x: Tensor,  # [B, I, *S]
    weight: Tensor,  # [O, I, *3]
    bias: Tensor | None,  # [O]
    negative_slope: float,
) -> Tensor:  # [B, O, *S]
    return _convolve(backend, x, weight, bias, negative_slope, out_axis=0)


def backward(
    backend: str,
    grad_y: Tensor,  # [B, O, *S]
    weight: Tensor,  # [O, I, *3]
) -> Tensor:  # [B, I, *S]
    return _convolve(backend, grad_y, weight, None, negative_slope=1.0, out_axis=1)


def weight(
    backend: str,
    grad_y: Tensor,  # [B, O, *S]
    x: Tensor,  # [B, I, *S]
    weight: Tensor,  # [O, I, *3], for its strides
) -> Tensor:  # [O, I, *3]
    read, upstream = _rows_read(x), rows(grad_y)
    gradient = empty_taps(weight)
    launch(
        backend,
        "convolution_weight",
        x.device,
        **geometry(x.shape[0], x.shape[2:], gradient, out_axis=0) | {"I": read.shape[1]},
        x=read.data_ptr(),
        grad_y=upstream.data_ptr(),
        grad_weight=gradient.data_ptr(),
    )
    return laid_out_as_weight(weight, gradient)


def _convolve(
    backend: str,
    x: Tensor,  # [B, channels read, *S]
    weight: Tensor,  # [O, I, *3]
    bias: Tensor | None,  # [channels written]
    negative_slope: float,
    out_axis: int,  # of the weight
) -> Tensor:  # [B, channels written, *S]
    read = _rows_read(x)
    matrix, offset = taps(weight), padded_bias(bias)
    sizes = geometry(x.shape[0], x.shape[2:], matrix, out_axis) | {"I": read.shape[1]}
    given = sizes | {"weight": matrix.data_ptr(), "mirrored": out_axis == 1}
    layout = launch(backend, "convolution_matrices", x.device, **given, matrices=0)

    def make_matrices() -> Tensor:
        count, *_ = layout
        matrices = _empty((count,))
        launch(backend, "convolution_matrices", x.device, **given, matrices=matrices.data_ptr())
        return matrices

    matrices = made_of_weight(weight, (layout, out_axis), make_matrices)
    y = empty_rows((x.shape[0], matrix.shape[out_axis], *x.shape[2:]))
    launch(
        backend,
        "convolution_forward",
        x.device,
        **sizes,
        x=read.data_ptr(),
        matrices=matrices.data_ptr(),
        bias=address(offset),
        negative_slope=negative_slope,
        y=y.data_ptr(),
    )
    return finish_rows(y, weight.shape[out_axis], x.dtype)


def _rows_read(
    x: Tensor,  # [B, I, *S]
) -> Tensor:
    # Few channels have a kernel of their own.
    return rows(x) if x.shape[1] >= CHANNEL_MULTIPLE else unpadded_rows(x)


# What all kernels of convolutions read and write: float32, channels last, and padded to multiples of CHANNEL_MULTIPLE.


def rows(
    x: Tensor,  # [B, channels, *S]
) -> Tensor:
    return unpadded_rows(_padded(x.float(), 1))


def unpadded_rows(
    x: Tensor,  # [B, channels, *S]
) -> Tensor:
    return x.float().contiguous(memory_format=channels_last(x.dim()))


def empty_rows(shape: Sequence[int]) -> Tensor:
    return _empty(shape, memory_format=channels_last(len(shape)))


def finish_rows(y: Tensor, channels: int, dtype: torch.dtype) -> Tensor:
    if y.shape[1] != channels:
        # A view could not be changed in place.
        y = y[:, :channels].clone(memory_format=channels_last(y.dim()))
    return y.to(dtype)


def taps(
    weight: Tensor,  # [O, I, *k]
) -> Tensor:
    """With one stride from tap to tap, as both memory formats have."""
    matrix = _padded(_padded(weight.float(), 0), 1)
    axes = range(2, weight.dim() - 1)
    if all(matrix.stride(axis) == matrix.shape[axis + 1] * matrix.stride(axis + 1) for axis in axes):
        return matrix
    return matrix.contiguous()


def empty_taps(weight: Tensor) -> Tensor:
    out_channels, in_channels = (side + -side % CHANNEL_MULTIPLE for side in weight.shape[:2])
    return _empty((out_channels, in_channels, *weight.shape[2:]))


def laid_out_as_weight(weight: Tensor, gradient: Tensor) -> Tensor:
    return torch.empty_like(weight).copy_(gradient[: weight.shape[0], : weight.shape[1]])


def padded_bias(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else _padded(bias.float(), 0).contiguous()


def geometry(
    batch: int,
    sides: Sequence[int],
    matrix: Tensor,  # [O, I, *k]
    out_axis: int,
) -> dict[str, Any]:
    volume = len(sides) == 3
    depth, height, width = sides if volume else (1, *sides)
    return {
        "B": batch,
        "D": depth,
        "H": height,
        "W": width,
        "volume": volume,
        "I": matrix.shape[1 - out_axis],
        "O": matrix.shape[out_axis],
        "out_stride": matrix.stride(out_axis),
        "in_stride": matrix.stride(1 - out_axis),
        "tap_stride": matrix.stride(-1),
    }


def _empty(shape: Sequence[int], memory_format: torch.memory_format = torch.contiguous_format) -> Tensor:
    """What the kernels write, whatever PyTorch's defaults are."""
    return torch.empty(shape, dtype=torch.float32, device="cpu", memory_format=memory_format)


def _padded(x: Tensor, axis: int) -> Tensor:
    missing = -x.shape[axis] % CHANNEL_MULTIPLE
    if missing == 0:
        return x
    zeros = x.new_zeros([missing if other == axis else side for other, side in enumerate(x.shape)])
    return torch.cat([x, zeros], dim=axis)
