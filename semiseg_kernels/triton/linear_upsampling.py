"""Upsampling by linear interpolation in Triton.

Along every axis  y[2 i] = 1/4 x[i - 1] + 3/4 x[i],  y[2 i + 1] = 3/4 x[i] + 1/4 x[i + 1],  with ends repeated.

Between two neighbours of x lie two of y, so that a cell between neighbours along every axis is read once and written
once: cell q between x[q - 1] and x[q] has y[2 q - 1] and y[2 q]. Backward gathers, for every element of x, the four of y
along every axis that it has a part in. A program has cells, or elements, of one plane.
"""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from semiseg_kernels.layouts import dense
from semiseg_kernels.linear_upsampling import doubled, halved, only_channels_last
from semiseg_kernels.triton.configurations import upsampling_tiles
from semiseg_kernels.triton.launch import launch
from semiseg_kernels.triton.tiles import stride_of

NEAR, FAR = tl.constexpr(0.75), tl.constexpr(0.25)
LARGE_PLANE = 2**31  # elements of y, which 32 bits do not count
_SIZES = ["depth", "height", "width", "C", "tiles_per_plane"]


@triton.jit
def _place(
    program, planes, rows, columns, C, tiles_per_plane, CHANNELS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Image, plane, rows and columns [BLOCK, 1], channels [1, CHANNELS], and which of a plane's places exist."""
    groups = tl.cdiv(C, CHANNELS)
    program, group = program // groups, program % groups
    plane, tile = program // tiles_per_plane, program % tiles_per_plane
    place = tl.cast(tile, columns.dtype) * BLOCK + tl.arange(0, BLOCK)[:, None]
    c = group * CHANNELS + tl.arange(0, CHANNELS)[None, :]
    return (
        plane // planes,
        plane % planes,
        place // columns,
        place % columns,
        c,
        (place < rows * columns) & (c < C),
    )


@triton.jit
def _plane(data, image, layer, layers, height, width, C, CHANNELS_LAST: tl.constexpr):
    """Where a plane's first element lies, and the strides of its columns and its channels."""
    size = tl.cast(height, tl.int64) * width
    if CHANNELS_LAST:
        return data + (tl.cast(image, tl.int64) * layers + layer) * size * C, C, 1
    else:
        return data + (tl.cast(image, tl.int64) * C * layers + layer) * size, 1, layers * size


@triton.jit
def _rows(layer, layers, height):
    """A plane's rows, none where there is no such plane."""
    return tl.where(layer < 0, 0, tl.where(layer < layers, height, 0))


@triton.jit
def _side(width, LARGE: tl.constexpr):
    """`width`, as int64 where that is what it takes to count the elements of a plane of y."""
    return tl.cast(width, tl.int64) if LARGE else width


@triton.jit
def _at(data, row, column, c, width, column_stride, channel_stride):
    """Where elements of the plane at `data` lie."""
    return data + (row * width + column).to(tl.int64) * column_stride + c * channel_stride


@triton.jit
def _read(data, row, column, c, width, column_stride, channel_stride, exists):
    at = _at(data, row, column, c, width, column_stride, channel_stride)
    return tl.load(at, mask=exists, other=0).to(tl.float32)


@triton.jit
def _between(first, second):
    """The two results between two neighbours."""
    return first * NEAR + second * FAR, first * FAR + second * NEAR


@triton.jit
def _interpolated(
    x, image, layer, depth, height, width, C, row, column, c, exists, CHANNELS_LAST: tl.constexpr
):
    """The four results, of two rows each two columns, that cells have of a plane of x."""
    data, column_stride, channel_stride = _plane(x, image, layer, depth, height, width, C, CHANNELS_LAST)
    above, below = tl.maximum(row - 1, 0), tl.minimum(row, height - 1)
    left, right = tl.maximum(column - 1, 0), tl.minimum(column, width - 1)
    above_left, above_right = _between(
        _read(data, above, left, c, width, column_stride, channel_stride, exists),
        _read(data, above, right, c, width, column_stride, channel_stride, exists),
    )
    below_left, below_right = _between(
        _read(data, below, left, c, width, column_stride, channel_stride, exists),
        _read(data, below, right, c, width, column_stride, channel_stride, exists),
    )
    above_left, below_left = _between(above_left, below_left)
    above_right, below_right = _between(above_right, below_right)
    return above_left, above_right, below_left, below_right


@triton.jit
def _write(data, row, column, c, rows, width, column_stride, channel_stride, values, exists):
    at = _at(data, row, column, c, width, column_stride, channel_stride)
    inside = exists & (row >= 0) & (row < rows) & (column >= 0) & (column < width)
    tl.store(at, values.to(data.dtype.element_ty), mask=inside)


@triton.jit
def _write_plane(
    y, image, layer, layers, height, width, C, row, column, c, values, exists, CHANNELS_LAST: tl.constexpr
):
    """The four results of cells to a plane of y."""
    data, column_stride, channel_stride = _plane(y, image, layer, layers, height, width, C, CHANNELS_LAST)
    rows = _rows(layer, layers, height)
    for i in tl.static_range(4):
        at_row, at_column = 2 * row - 1 + i // 2, 2 * column - 1 + i % 2
        _write(data, at_row, at_column, c, rows, width, column_stride, channel_stride, values[i], exists)


@triton.jit(do_not_specialize=_SIZES)
def _forward(
    x,  # [B, C, depth, height, width]
    y,  # [B, C, *2S]
    depth,
    height,
    width,
    C,
    tiles_per_plane,
    VOLUMES: tl.constexpr,  # else images, whose depth is 1 and stays so
    CHANNELS: tl.constexpr,
    BLOCK: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    ALIGNED: tl.constexpr,
    LARGE: tl.constexpr,
):
    width = _side(width, LARGE)
    image, layer, row, column, c, exists = _place(
        tl.program_id(0), depth + 1 if VOLUMES else 1, height + 1, width + 1, C, tiles_per_plane, CHANNELS, BLOCK
    )
    C = stride_of(C, ALIGNED)
    if VOLUMES:
        upper = _interpolated(
            x, image, tl.maximum(layer - 1, 0), depth, height, width, C, row, column, c, exists, CHANNELS_LAST
        )
        lower = _interpolated(
            x, image, tl.minimum(layer, depth - 1), depth, height, width, C, row, column, c, exists, CHANNELS_LAST,
        )  # fmt: skip
        upper_0, lower_0 = _between(upper[0], lower[0])
        upper_1, lower_1 = _between(upper[1], lower[1])
        upper_2, lower_2 = _between(upper[2], lower[2])
        upper_3, lower_3 = _between(upper[3], lower[3])
        _write_plane(
            y, image, 2 * layer - 1, 2 * depth, 2 * height, 2 * width, C, row, column, c, (upper_0, upper_1, upper_2, upper_3),
            exists, CHANNELS_LAST,
        )  # fmt: skip
        _write_plane(
            y, image, 2 * layer, 2 * depth, 2 * height, 2 * width, C, row, column, c, (lower_0, lower_1, lower_2, lower_3),
            exists, CHANNELS_LAST,
        )  # fmt: skip
    else:
        values = _interpolated(x, image, 0, 1, height, width, C, row, column, c, exists, CHANNELS_LAST)
        _write_plane(y, image, 0, 1, 2 * height, 2 * width, C, row, column, c, values, exists, CHANNELS_LAST)


@triton.jit
def _part(j, which, side):
    """The part that an element has in result j of 2 side, the `which`-th of its four."""
    part = tl.where((which == 1) | (which == 2), NEAR, FAR)
    return tl.where((j == 0) | (j == 2 * side - 1), 1.0, part)


@triton.jit(do_not_specialize=_SIZES)
def _backward(
    grad_y,  # [B, C, *2S]
    grad_x,  # [B, C, depth, height, width]
    depth,
    height,
    width,
    C,
    tiles_per_plane,
    VOLUMES: tl.constexpr,
    CHANNELS: tl.constexpr,
    BLOCK: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,  # of grad_x
    UPSTREAM_CHANNELS_LAST: tl.constexpr,  # of grad_y
    ALIGNED: tl.constexpr,
    LARGE: tl.constexpr,
):
    width = _side(width, LARGE)
    image, layer, row, column, c, exists = _place(
        tl.program_id(0), depth, height, width, C, tiles_per_plane, CHANNELS, BLOCK
    )
    C = stride_of(C, ALIGNED)
    layers = 2 * depth if VOLUMES else 1
    total = tl.zeros([BLOCK, CHANNELS], tl.float32)
    for deep in range(4 if VOLUMES else 1):
        i = 2 * layer - 1 + deep if VOLUMES else layer
        of_layer = _part(i, deep, depth) if VOLUMES else 1.0
        data, column_stride, channel_stride = _plane(
            grad_y, image, i, layers, 2 * height, 2 * width, C, UPSTREAM_CHANNELS_LAST
        )
        rows = _rows(i, layers, 2 * height)
        for high in range(4):
            j = 2 * row - 1 + high
            of_row = of_layer * _part(j, high, height)
            for wide in tl.static_range(4):
                k = 2 * column - 1 + wide
                inside = exists & (j >= 0) & (j < rows) & (k >= 0) & (k < 2 * width)
                values = _read(data, j, k, c, 2 * width, column_stride, channel_stride, inside)
                total += of_row * _part(k, wide, width) * values
    data, column_stride, channel_stride = _plane(grad_x, image, layer, depth, height, width, C, CHANNELS_LAST)
    _write(data, row, column, c, height, width, column_stride, channel_stride, total, exists)


def _sizes(
    x: Tensor,  # [B, C, *S], whose sides are to be doubled
    backward: bool,  # programs divide its elements, else its cells
) -> tuple[int, dict[str, Any]]:  # number of programs, arguments
    C, (*depth, height, width) = x.shape[1], x.shape[2:]
    more = int(not backward)
    channels_last = only_channels_last(x)
    tiles = upsampling_tiles(C, channels_last, backward)
    tiles_per_plane = triton.cdiv((height + more) * (width + more), tiles.block)
    planes = x.shape[0] * (depth[0] + more if depth else 1)
    arguments = {
        "depth": depth[0] if depth else 1, "height": height, "width": width, "C": C,
        "tiles_per_plane": tiles_per_plane, "VOLUMES": bool(depth), "CHANNELS": tiles.channels,
        "BLOCK": tiles.block, "CHANNELS_LAST": channels_last, "ALIGNED": C % 16 == 0,
        "LARGE": 4 * height * width >= LARGE_PLANE,
    }  # fmt: skip
    return planes * tiles_per_plane * triton.cdiv(C, tiles.channels), arguments


def forward(
    x: Tensor,  # [B, C, *S]
) -> Tensor:  # [B, C, *2S]
    read = dense(x)
    y = doubled(read)
    programs, sizes = _sizes(read, backward=False)
    launch(_forward, (programs,), x, num_warps=4, x=read, y=y, **sizes)
    return y


def backward(
    grad_y: Tensor,  # [B, C, *2S]
    channels_last: bool,  # the memory format of the gradient
) -> Tensor:  # [B, C, *S]
    upstream, grad_x = dense(grad_y), halved(grad_y, channels_last)
    programs, sizes = _sizes(grad_x, backward=True)
    launch(
        _backward, (programs,), grad_y, num_warps=4, grad_y=upstream, grad_x=grad_x,
        UPSTREAM_CHANNELS_LAST=only_channels_last(upstream), **sizes,
    )  # fmt: skip
    return grad_x
