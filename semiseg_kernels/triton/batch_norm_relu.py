"""Batch normalisation and the ReLU behind it in Triton.

h = scale (x - mean) + bias,  y = h where h > 0, negative_slope h elsewhere;  scale = weight / sqrt(variance + epsilon)
g = grad_y where h > 0, negative_slope grad_y elsewhere
grad_x = scale (g - offset - tilt (x - mean)),  with the sums over all N voxels of a channel
offset = sum g / N,  tilt = sum g (x - mean) / (N (variance + epsilon))

Here [B, C, N] is a dense tensor; a channels-last batch is read as one image, whose voxels are those of all.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from semiseg_kernels.layouts import dense, is_channels_last, laid_out_as
from semiseg_kernels.triton.configurations import norm_tiles, norm_tiles_per_program
from semiseg_kernels.triton.launch import in_two, launch
from semiseg_kernels.triton.sums import add_partials
from semiseg_kernels.triton.tiles import count_tiles, locate, offsets, stride_of

CHANNELS = 128  # of a program that passes over no voxels
_SIZES = ["batch", "C", "N"]


@triton.jit
def _share(program, C, CHANNELS: tl.constexpr):
    """A program's number among those of its channels, and the channels [1, CHANNELS].

    Programs of the same voxels are neighbours: their elements lie in the same pages of memory.
    """
    groups = tl.cdiv(C, CHANNELS)
    return program // groups, program % groups * CHANNELS + tl.arange(0, CHANNELS)[None, :]


@triton.jit
def _sizes(C, N, CHANNELS_LAST: tl.constexpr, ALIGNED: tl.constexpr):
    """C and N as int64; which of them is the length of a row, the compiler knows to be a multiple of 16."""
    if CHANNELS_LAST:
        return stride_of(C, ALIGNED), tl.cast(N, tl.int64)
    else:
        return tl.cast(C, tl.int64), stride_of(N, ALIGNED)


@triton.jit
def _place(tile, c, batch, C, N, BLOCK: tl.constexpr, CHANNELS_LAST: tl.constexpr):
    """Where a tile's elements [BLOCK, CHANNELS] lie, which of them exist, and how many voxels do."""
    image, first, inside = locate(tile, batch, N, BLOCK)
    voxel = first + tl.arange(0, BLOCK)[:, None]
    at = image * (C * N) + offsets(voxel, c, C if CHANNELS_LAST else N, CHANNELS_LAST)
    return at, inside & (c < C), tl.minimum(N - first, BLOCK)


@triton.jit
def _read(x, at, inside):
    """A tile as float32, 0 where nothing exists."""
    return tl.load(x + at, mask=inside, other=0).to(tl.float32)


@triton.jit
def _read_channels(rows, row: tl.constexpr, c, C):
    """A row of rows [n, C], at the channels c."""
    return tl.load(rows + row * C + c, mask=c < C, other=0)


@triton.jit
def _read_parameters(parameters, c, C):
    """Mean, scale and bias, [1, CHANNELS] each."""
    return (
        _read_channels(parameters, 0, c, C),
        _read_channels(parameters, 1, c, C),
        _read_channels(parameters, 2, c, C),
    )


@triton.jit
def _activated(h, negative_slope):
    return tl.where(h > 0, h, negative_slope * h)


@triton.jit
def _gradient(h, grad_y, negative_slope):
    """The gradient to h; 0 times an infinity would be NaN."""
    return tl.where(h > 0, grad_y, tl.where(negative_slope == 0, 0.0, negative_slope * grad_y))


@triton.jit
def _store_sums(partials, program, c, C, first, second):
    """Write a program's sums [1, CHANNELS] of its tiles to its row of partials [programs, 2, C]."""
    row = partials + program * (2 * C) + c
    tl.store(row, first, mask=c < C)
    tl.store(row + C, second, mask=c < C)


@triton.jit(do_not_specialize=[*_SIZES, "tiles_per_program"])
def _statistics(
    x,  # [B, C, N]
    partials,  # [programs, 2, C] float64, of the distances from the channel's first voxel, and of their squares
    batch,
    C,
    N,
    tiles_per_program,
    CHANNELS: tl.constexpr,
    BLOCK: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    program, c = _share(tl.program_id(0), C, CHANNELS)
    C, N = _sizes(C, N, CHANNELS_LAST, ALIGNED)
    tiles = count_tiles(batch, N, BLOCK)
    begin = program * tiles_per_program
    # Distances are small from the mean of the first tile; from zero, or from an outlier that is the channel's first
    # voxel, their squares would lose digits in float32.
    at, inside, voxels = _place(begin, c, batch, C, N, BLOCK, CHANNELS_LAST)
    near = tl.sum(_read(x, at, inside), axis=0, keep_dims=True) / voxels
    distances = tl.zeros([BLOCK, CHANNELS], tl.float32)
    squares = tl.zeros([BLOCK, CHANNELS], tl.float32)
    count = tl.full([], 0, tl.int64)
    for tile in tl.range(begin, tl.minimum(begin + tiles_per_program, tiles), disable_licm=True):
        at, inside, voxels = _place(tile, c, batch, C, N, BLOCK, CHANNELS_LAST)
        distance = tl.where(inside, _read(x, at, inside) - near, 0.0)
        distances += distance
        squares += distance * distance
        count += voxels
    distance = tl.sum(distances, axis=0, keep_dims=True).to(tl.float64)
    square = tl.sum(squares, axis=0, keep_dims=True).to(tl.float64)
    origin = tl.load(x + c * (1 if CHANNELS_LAST else N), mask=c < C, other=0).to(tl.float64)
    step, number = near.to(tl.float64) - origin, count.to(tl.float64)
    _store_sums(
        partials, program, c, C, distance + number * step, square + step * (2 * distance + number * step)
    )


@triton.jit(do_not_specialize=["C", "stride", "count"])
def _moments(
    sums,  # [2, C] float64, see _statistics
    x,  # [B, C, N]
    mean,  # [C] float64
    variance,  # [C] float64
    C,
    stride,  # of the channels of x
    count,  # B * N
    CHANNELS: tl.constexpr,
):
    c = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    origin = tl.load(x + tl.cast(c, tl.int64) * stride, mask=c < C, other=0).to(tl.float64)
    number = tl.cast(count, tl.float64)
    distance = tl.load(sums + c, mask=c < C, other=0) / number
    square = tl.load(sums + C + c, mask=c < C, other=0) / number - distance * distance
    tl.store(mean + c, origin + distance, mask=c < C)
    tl.store(variance + c, tl.where(square < 0, 0.0, square), mask=c < C)


@triton.jit
def _voxels_of_all(count, voxels):
    if count is None:
        return tl.cast(voxels, tl.float64)
    else:
        return tl.load(count)


@triton.jit(do_not_specialize=["C", "voxels"])
def _parameters(
    mean,  # [C] float64
    variance,  # [C] float64
    weight,  # [C]
    bias,  # [C]
    running_mean,  # [C], updated in place
    running_variance,  # [C], updated in place
    count,  # [] float64, voxels of all processes, or None
    parameters,  # [3, C]: mean, scale, bias
    exact,  # [2, C] float64: rounding, inverse
    C,
    voxels,  # of x
    momentum,
    momentum_rest,  # see in_two
    epsilon,
    epsilon_rest,
    CHANNELS: tl.constexpr,
):
    c = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    exists = c < C
    average = tl.load(mean + c, mask=exists, other=0)
    square = tl.load(variance + c, mask=exists, other=0)
    # The passes take distances from the rounded mean; what it lacks goes into the bias, and later into the offset.
    rounding = average - average.to(tl.float32).to(tl.float64)
    inverse = 1 / tl.sqrt(square + (tl.cast(epsilon, tl.float64) + epsilon_rest))
    scale = tl.load(weight + c, mask=exists, other=0).to(tl.float64) * inverse
    shift = tl.load(bias + c, mask=exists, other=0).to(tl.float64) - scale * rounding
    tl.store(parameters + c, average.to(tl.float32), mask=exists)
    tl.store(parameters + C + c, scale.to(tl.float32), mask=exists)
    tl.store(parameters + 2 * C + c, shift.to(tl.float32), mask=exists)
    tl.store(exact + c, rounding, mask=exists)
    tl.store(exact + C + c, inverse, mask=exists)
    eta, number = tl.cast(momentum, tl.float64) + momentum_rest, _voxels_of_all(count, voxels)
    _move(running_mean + c, average, eta, exists)
    _move(running_variance + c, square * (number / (number - 1)), eta, exists)


@triton.jit
def _move(running, batch, momentum, exists):
    moved = (1 - momentum) * tl.load(running, mask=exists, other=0).to(tl.float64) + momentum * batch
    tl.store(running, moved.to(tl.float32).to(running.dtype.element_ty), mask=exists)


@triton.jit(do_not_specialize=_SIZES)
def _forward(
    x,  # [B, C, N]
    parameters,  # [3, C]: mean, scale, bias
    y,  # [B, C, N]
    batch,
    C,
    N,
    negative_slope,
    CHANNELS: tl.constexpr,
    BLOCK: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    # From the end: what the statistics read last is still in the cache.
    tile, c = _share(tl.num_programs(0) - 1 - tl.program_id(0), C, CHANNELS)
    C, N = _sizes(C, N, CHANNELS_LAST, ALIGNED)
    at, inside, _ = _place(tile, c, batch, C, N, BLOCK, CHANNELS_LAST)
    mean, scale, bias = _read_parameters(parameters, c, C)
    h = scale * (_read(x, at, inside) - mean) + bias
    tl.store(y + at, _activated(h, negative_slope).to(y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=[*_SIZES, "tiles_per_program"])
def _sums(
    grad_y,  # [B, C, N]
    x,  # [B, C, N]
    parameters,  # [3, C]
    partials,  # [programs, 2, C] float64, of g and of g (x - mean)
    batch,
    C,
    N,
    tiles_per_program,
    negative_slope,
    CHANNELS: tl.constexpr,
    BLOCK: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    program, c = _share(tl.program_id(0), C, CHANNELS)
    C, N = _sizes(C, N, CHANNELS_LAST, ALIGNED)
    tiles = count_tiles(batch, N, BLOCK)
    begin = program * tiles_per_program
    mean, scale, bias = _read_parameters(parameters, c, C)
    gradients = tl.zeros([BLOCK, CHANNELS], tl.float32)
    products = tl.zeros([BLOCK, CHANNELS], tl.float32)
    for tile in tl.range(begin, tl.minimum(begin + tiles_per_program, tiles), disable_licm=True):
        at, inside, _ = _place(tile, c, batch, C, N, BLOCK, CHANNELS_LAST)
        centred = _read(x, at, inside) - mean
        g = _gradient(scale * centred + bias, _read(grad_y, at, inside), negative_slope)
        gradients += g
        products += g * centred
    gradient = tl.sum(gradients, axis=0, keep_dims=True).to(tl.float64)
    product = tl.sum(products, axis=0, keep_dims=True).to(tl.float64)
    _store_sums(partials, program, c, C, gradient, product)


@triton.jit(do_not_specialize=["C", "voxels"])
def _correction(
    sums,  # [2, C] float64, of g and of g (x - rounded mean)
    joined,  # [2, C] float64, those of all processes
    exact,  # [2, C] float64: rounding, inverse
    count,  # [] float64, voxels of all processes, or None
    correction,  # [2, C]: offset, tilt
    grad_weight,  # [C]
    grad_bias,  # [C]
    C,
    voxels,  # of x
    CHANNELS: tl.constexpr,
):
    c = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    exists = c < C
    rounding, inverse = _read_channels(exact, 0, c, C), _read_channels(exact, 1, c, C)
    gradient, product = _read_sums(sums, rounding, c, C)
    tl.store(grad_weight + c, (product * inverse).to(tl.float32), mask=exists)
    tl.store(grad_bias + c, gradient.to(tl.float32), mask=exists)
    gradient, product = _read_sums(joined, rounding, c, C)
    number = _voxels_of_all(count, voxels)
    tilt = product / number * inverse * inverse
    tl.store(correction + c, (gradient / number - tilt * rounding).to(tl.float32), mask=exists)
    tl.store(correction + C + c, tilt.to(tl.float32), mask=exists)


@triton.jit
def _read_sums(sums, rounding, c, C):
    """Sums of g and of g (x - mean)."""
    gradient = _read_channels(sums, 0, c, C)
    return gradient, _read_channels(sums, 1, c, C) - gradient * rounding


@triton.jit(do_not_specialize=_SIZES)
def _backward(
    grad_y,  # [B, C, N]
    x,  # [B, C, N]
    parameters,  # [3, C]
    correction,  # [2, C]: offset, tilt
    grad_x,  # [B, C, N]
    batch,
    C,
    N,
    negative_slope,
    CHANNELS: tl.constexpr,
    BLOCK: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    # From the end, as forward.
    tile, c = _share(tl.num_programs(0) - 1 - tl.program_id(0), C, CHANNELS)
    C, N = _sizes(C, N, CHANNELS_LAST, ALIGNED)
    at, inside, _ = _place(tile, c, batch, C, N, BLOCK, CHANNELS_LAST)
    mean, scale, bias = _read_parameters(parameters, c, C)
    offset, tilt = _read_channels(correction, 0, c, C), _read_channels(correction, 1, c, C)
    centred = _read(x, at, inside) - mean
    g = _gradient(scale * centred + bias, _read(grad_y, at, inside), negative_slope)
    gradient = scale * (g - offset - tilt * centred)
    tl.store(grad_x + at, gradient.to(grad_x.dtype.element_ty), mask=inside)


class _Batch(NamedTuple):
    """A dense tensor, and what a kernel has to know of its sizes."""

    data: Tensor
    voxels: int  # of all images
    channel_stride: int
    tiles: int
    groups: int  # of channels
    arguments: dict[str, Any]

    def launch(self, kernel: Any, programs: int, **arguments: Any) -> None:
        """Run a kernel with so many programs for every group of channels."""
        launch(kernel, (programs * self.groups,), self.data, num_warps=4, **arguments, **self.arguments)

    def launch_sums(
        self,
        kernel: Any,
        **arguments: Any,
    ) -> Tensor:  # [2, C] float64
        """The two sums over all voxels that a kernel takes of its tiles."""
        C = self.data.shape[1]
        per_program = norm_tiles_per_program(self.tiles * self.groups)
        programs = triton.cdiv(self.tiles, per_program)
        partials = torch.empty(programs, 2 * C, dtype=torch.float64, device=self.data.device)
        self.launch(kernel, programs, **arguments, partials=partials, tiles_per_program=per_program)
        return add_partials(partials).view(2, C)


def _as_batch(
    x: Tensor,  # [B, C, *S]
) -> _Batch:
    data = dense(x)
    (batch, C), N = x.shape[:2], x.shape[2:].numel()
    voxels = batch * N
    channels_last = C > 1 and is_channels_last(data)
    if channels_last:
        batch, N = 1, voxels
    tiles = norm_tiles(C, channels_last)
    arguments = {
        "batch": batch, "C": C, "N": N, "CHANNELS": tiles.channels, "BLOCK": tiles.block,
        "CHANNELS_LAST": channels_last, "ALIGNED": (C if channels_last else N) % 16 == 0,
    }  # fmt: skip
    return _Batch(
        data,
        voxels,
        1 if channels_last else N,
        batch * triton.cdiv(N, tiles.block),
        triton.cdiv(C, tiles.channels),
        arguments,
    )


def statistics(
    x: Tensor,  # [B, C, *S]
) -> tuple[Tensor, Tensor]:  # mean and variance [C] float64
    read, C = _as_batch(x), x.shape[1]
    sums = read.launch_sums(_statistics, x=read.data)
    mean = torch.empty(C, dtype=torch.float64, device=x.device)
    variance = torch.empty_like(mean)
    launch(
        _moments, (triton.cdiv(C, CHANNELS),), x, num_warps=4, sums=sums, x=read.data, mean=mean, variance=variance,
        C=C, stride=read.channel_stride, count=read.voxels, CHANNELS=CHANNELS,
    )  # fmt: skip
    return mean, variance


def parameters(
    mean: Tensor,  # [C] float64
    variance: Tensor,  # [C] float64
    weight: Tensor,  # [C]
    bias: Tensor,  # [C]
    running_mean: Tensor,  # [C], updated in place
    running_variance: Tensor,  # [C], updated in place
    count: Tensor | None,  # [] float64, voxels of all processes
    voxels: int,  # of x
    momentum: float,
    epsilon: float,
) -> tuple[Tensor, Tensor]:  # [3, C] float32: mean, scale, bias; [2, C] float64: rounding, inverse
    (C,) = mean.shape
    running = running_mean, running_variance
    updated = [values.contiguous() for values in running]
    result = torch.empty(3, C, dtype=torch.float32, device=mean.device)
    exact = torch.empty(2, C, dtype=torch.float64, device=mean.device)
    momentum, momentum_rest = in_two(momentum)
    epsilon, epsilon_rest = in_two(epsilon)
    launch(
        _parameters, (triton.cdiv(C, CHANNELS),), mean, num_warps=4, mean=mean, variance=variance,
        weight=weight.contiguous(), bias=bias.contiguous(), running_mean=updated[0], running_variance=updated[1],
        count=count, parameters=result, exact=exact, C=C, voxels=voxels, momentum=momentum,
        momentum_rest=momentum_rest, epsilon=epsilon, epsilon_rest=epsilon_rest, CHANNELS=CHANNELS,
    )  # fmt: skip
    for own, values in zip(running, updated, strict=True):
        if values is not own:
            own.copy_(values)
    return result, exact


def forward(
    x: Tensor,  # [B, C, *S]
    parameters: Tensor,  # [3, C] float32: mean, scale, bias
    negative_slope: float,
) -> Tensor:  # [B, C, *S]
    read = _as_batch(x)
    y = torch.empty_like(read.data)
    read.launch(_forward, read.tiles, x=read.data, parameters=parameters, y=y, negative_slope=negative_slope)
    return y


def sums(
    grad_y: Tensor,  # [B, C, *S]
    x: Tensor,  # [B, C, *S]
    parameters: Tensor,  # [3, C] float32
    negative_slope: float,
) -> Tensor:  # [2, C] float64
    read = _as_batch(x)
    return read.launch_sums(
        _sums, grad_y=laid_out_as(read.data, grad_y), x=read.data, parameters=parameters,
        negative_slope=negative_slope,
    )  # fmt: skip


def correction(
    sums: Tensor,  # [2, C] float64
    joined: Tensor,  # [2, C] float64, of all processes
    exact: Tensor,  # [2, C] float64: rounding, inverse
    count: Tensor | None,  # [] float64, voxels of all processes
    voxels: int,  # of x
) -> tuple[Tensor, Tensor, Tensor]:  # [2, C]: offset, tilt; [C]: gradients of weight and bias
    C = sums.shape[1]
    result = torch.empty(2, C, dtype=torch.float32, device=sums.device)
    grad_weight, grad_bias = (torch.empty(C, dtype=torch.float32, device=sums.device) for _ in range(2))
    launch(
        _correction, (triton.cdiv(C, CHANNELS),), sums, num_warps=4, sums=sums, joined=joined, exact=exact, count=count,
        correction=result, grad_weight=grad_weight, grad_bias=grad_bias, C=C, voxels=voxels, CHANNELS=CHANNELS,
    )  # fmt: skip
    return result, grad_weight, grad_bias


def backward(
    grad_y: Tensor,  # [B, C, *S]
    x: Tensor,  # [B, C, *S]
    parameters: Tensor,  # [3, C] float32
    correction: Tensor,  # [2, C] float32: offset, tilt
    negative_slope: float,
) -> Tensor:  # [B, C, *S]
    read = _as_batch(x)
    grad_x = torch.empty_like(read.data)
    read.launch(
        _backward, read.tiles, grad_y=laid_out_as(read.data, grad_y), x=read.data, parameters=parameters,
        correction=correction, grad_x=grad_x, negative_slope=negative_slope,
    )  # fmt: skip
    return grad_x
