from typing import Any

import torch
from torch import Tensor

from semiseg_kernels.convolution import CHANNEL_MULTIPLE, channels_last
from semiseg_kernels.native.extension import address, launch


def forward(
    backend: str,
    x: Tensor,  # [B, I, *S]
    weight: Tensor,  # [O, I, *3]
    bias: Tensor | None,  # [O]
) -> Tensor:  # [B, O, *S]
    offset = None if bias is None else _padded(bias.float(), 0)
    return _convolve(backend, x, weight, weight.shape[0], 0, bias=address(offset), mirrored=False)


def backward(
    backend: str,
    grad_y: Tensor,  # [B, O, *S]
    weight: Tensor,  # [O, I, *3]
) -> Tensor:  # [B, I, *S]
    return _convolve(backend, grad_y, weight, weight.shape[1], 1, bias=0, mirrored=True)


def weight(
    backend: str,
    grad_y: Tensor,  # [B, O, *S]
    x: Tensor,  # [B, I, *S]
    weight: Tensor,  # [O, I, *3], for its strides
) -> Tensor:  # [O, I, *3]
    rows, upstream = _rows(x), _rows(grad_y)
    O, I = (side + -side % CHANNEL_MULTIPLE for side in weight.shape[:2])
    gradient = torch.empty(O, I, *weight.shape[2:])
    launch(
        backend,
        "convolution_weight",
        x.device,
        **_geometry(rows, gradient, out_axis=0),
        x=rows.data_ptr(),
        grad_y=upstream.data_ptr(),
        grad_weight=gradient.data_ptr(),
    )
    return torch.empty_like(weight).copy_(gradient[: weight.shape[0], : weight.shape[1]])


def _convolve(
    backend: str,
    x: Tensor,  # [B, channels read, *S]
    weight: Tensor,  # [O, I, *3]
    channels: int,  # written
    out_axis: int,  # of the weight
    bias: int,  # address
    mirrored: bool,
) -> Tensor:  # [B, channels, *S]
    rows = _rows(x)
    taps = _padded(_padded(weight.float(), 0), 1)
    if not _has_one_tap_stride(taps):
        taps = taps.contiguous()
    shape = (rows.shape[0], taps.shape[out_axis], *rows.shape[2:])
    y = torch.empty(shape, memory_format=channels_last(x))
    launch(
        backend,
        "convolution_forward",
        x.device,
        **_geometry(rows, taps, out_axis),
        x=rows.data_ptr(),
        weight=taps.data_ptr(),
        mirrored=mirrored,
        bias=bias,
        y=y.data_ptr(),
    )
    return y[:, :channels].to(x.dtype).contiguous(memory_format=channels_last(x))


def _rows(
    x: Tensor,  # [B, channels, *S]
) -> Tensor:
    """float32 and channels-last, the channels padded with zeros."""
    return _padded(x.float(), 1).contiguous(memory_format=channels_last(x))


def _padded(x: Tensor, axis: int) -> Tensor:
    missing = -x.shape[axis] % CHANNEL_MULTIPLE
    if missing == 0:
        return x
    zeros = x.new_zeros([missing if other == axis else side for other, side in enumerate(x.shape)])
    return torch.cat([x, zeros], dim=axis)


def _has_one_tap_stride(weight: Tensor) -> bool:  # [O, I, *3]
    """As both memory formats have."""
    return all(weight.stride(axis) == 3 * weight.stride(axis + 1) for axis in range(2, weight.dim() - 1))


def _geometry(
    x: Tensor,  # [B, channels, *S]
    taps: Tensor,  # [O, I, *3]
    out_axis: int,
) -> dict[str, Any]:
    batch, _, *sides = x.shape
    volume = len(sides) == 3
    depth, height, width = sides if volume else (1, *sides)
    return {
        "B": batch,
        "D": depth,
        "H": height,
        "W": width,
        "volume": volume,
        "I": taps.shape[1 - out_axis],
        "O": taps.shape[out_axis],
        "out_stride": taps.stride(out_axis),
        "in_stride": taps.stride(1 - out_axis),
        "tap_stride": taps.stride(-1),
    }
