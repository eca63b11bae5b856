"""Dice and cross-entropy in Triton; class_losses.py has the formulas."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from semiseg_kernels.dice_ce import statistics_size
from semiseg_kernels.layouts import finish_gradient
from semiseg_kernels.triton.class_losses import (
    add_statistics,
    class_gradient,
    derivatives,
    losses,
    no_statistics,
    read_classes,
    read_derivatives,
    read_regions,
    softmax,
    store_statistics,
)
from semiseg_kernels.triton.configurations import class_tiles, regions_at_once
from semiseg_kernels.triton.launch import Voxels, as_voxels, is_aligned, launch, with_gradient
from semiseg_kernels.triton.sums import add_partials
from semiseg_kernels.triton.tiles import locate, offsets, read_labels, start, strides_of

_STRIDES = ["batch_stride", "stride", "target_batch_stride", "target_stride"]


@triton.jit
def _read_target(
    target, image, first, voxel, inside, batch_stride, stride,
    C: tl.constexpr, CLASSES: tl.constexpr, CHANNELS_LAST: tl.constexpr,
):  # fmt: skip
    """The target y [BLOCK, CLASSES] and the voxels kept [BLOCK, 1]; with probabilities all are."""
    if target.dtype.element_ty.is_floating():
        target = start(target, image, first, batch_stride, stride, CHANNELS_LAST)
        return read_classes(target, inside, stride, C, CLASSES, CHANNELS_LAST), inside
    else:
        label = read_labels(target, voxel, inside, C)
        return (tl.arange(0, CLASSES)[None, :] == label).to(tl.float32), label >= 0


@triton.jit(do_not_specialize=["batch", "N", "num_regions", "ce_at", *_STRIDES])
def _forward(
    logits,  # [B, C, N]
    target,  # [B, N] labels or [B, C, N] probabilities
    regions,  # [B, N] or None
    partials,  # [programs, statistics and cross-entropies]
    batch,
    N,
    num_regions,
    ce_at,  # of the cross-entropies in a row of the partials
    batch_stride,
    stride,
    target_batch_stride,
    target_stride,
    inverse_temperature,
    C: tl.constexpr,
    CLASSES: tl.constexpr,
    REGIONS: tl.constexpr,
    BLOCK: tl.constexpr,
    TILES: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    TARGET_CHANNELS_LAST: tl.constexpr,
    ALIGNED: tl.constexpr,
    SQUARED: tl.constexpr,
):
    N, batch_stride, stride = strides_of((N, batch_stride, stride), ALIGNED)
    target_batch_stride, target_stride = strides_of((target_batch_stride, target_stride), ALIGNED)
    program = tl.program_id(0)
    first_region = tl.program_id(1) * REGIONS
    statistics = no_statistics(REGIONS, CLASSES)
    for tile in tl.range(program * TILES, (program + 1) * TILES, disable_licm=True):
        image, first, inside = locate(tile, batch, N, BLOCK)
        voxel = image * N + first + tl.arange(0, BLOCK)[:, None]
        x = start(logits, image, first, batch_stride, stride, CHANNELS_LAST)
        x = read_classes(x, inside, stride, C, CLASSES, CHANNELS_LAST)
        y, kept = _read_target(
            target, image, first, voxel, inside, target_batch_stride, target_stride,
            C, CLASSES, TARGET_CHANNELS_LAST,
        )  # fmt: skip
        x = tl.where(tl.arange(0, CLASSES)[None, :] < C, x, -float("inf"))
        probability, surprise = softmax(x, inverse_temperature)
        region = read_regions(regions, voxel, kept)
        statistics = add_statistics(statistics, probability, surprise, y, region, kept, first_region, SQUARED)
    row = partials + tl.cast(program, tl.int64) * (ce_at + num_regions)
    store_statistics(statistics, row, row + ce_at, first_region, num_regions, C)


@triton.jit(
    do_not_specialize=["batch", "N", "num_regions", *_STRIDES, "gradient_batch_stride", "gradient_stride"]
)
def _backward(
    table,  # [R, 1 + 2 C]
    logits,  # [B, C, N]
    target,  # [B, N] labels or [B, C, N] probabilities
    regions,  # [B, N] or None
    gradient,  # [B, C, N]
    batch,
    N,
    num_regions,
    batch_stride,
    stride,
    target_batch_stride,
    target_stride,
    gradient_batch_stride,
    gradient_stride,
    inverse_temperature,
    C: tl.constexpr,
    CLASSES: tl.constexpr,
    BLOCK: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    TARGET_CHANNELS_LAST: tl.constexpr,
    ALIGNED: tl.constexpr,
    SQUARED: tl.constexpr,
):
    N, batch_stride, stride = strides_of((N, batch_stride, stride), ALIGNED)
    target_batch_stride, target_stride = strides_of((target_batch_stride, target_stride), ALIGNED)
    gradient_batch_stride, gradient_stride = strides_of((gradient_batch_stride, gradient_stride), ALIGNED)
    image, first, inside = locate(tl.program_id(0), batch, N, BLOCK)
    voxel = image * N + first + tl.arange(0, BLOCK)[:, None]
    x = start(logits, image, first, batch_stride, stride, CHANNELS_LAST)
    x = read_classes(x, inside, stride, C, CLASSES, CHANNELS_LAST)
    y, kept = _read_target(
        target, image, first, voxel, inside, target_batch_stride, target_stride,
        C, CLASSES, TARGET_CHANNELS_LAST,
    )  # fmt: skip
    c = tl.arange(0, CLASSES)[None, :]
    probability, _ = softmax(tl.where(c < C, x, -float("inf")), inverse_temperature)
    of_region = read_derivatives(table, read_regions(regions, voxel, kept), num_regions, C, CLASSES)
    by_logit = class_gradient(of_region, probability, y, kept, inverse_temperature, SQUARED)
    at = start(gradient, image, first, gradient_batch_stride, gradient_stride, CHANNELS_LAST)
    at += offsets(tl.arange(0, BLOCK)[:, None], c, gradient_stride, CHANNELS_LAST)
    tl.store(at, by_logit.to(gradient.dtype.element_ty), mask=inside & (c < C))


def _read_as(
    target: Tensor,  # [B, *S] labels or [B, C, *S] probabilities
) -> Voxels:
    if target.is_floating_point():
        return as_voxels(target)
    return Voxels(target.contiguous(), 0, 0, False)  # labels lie as the voxels do


def forward(
    logits: Tensor,  # [B, C, *S]
    target: Tensor,  # [B, *S] labels or [B, C, *S] probabilities
    regions: Tensor | None,  # [B, *S]
    num_regions: int,
    temperature: float,
    squared: bool,
    first_class: int,
) -> tuple[Tensor, Tensor, Tensor]:  # ce [R], dice [R], statistics
    read, wanted = as_voxels(logits), _read_as(target)
    batch, C, N = read.data.shape
    tiles, at_once = class_tiles(C), regions_at_once(num_regions)
    programs = read.count_programs(tiles.block, tiles.tiles)
    size = statistics_size(num_regions, C)
    partials = torch.empty(programs, size + num_regions, dtype=torch.float32, device=logits.device)
    launch(
        _forward, (programs, triton.cdiv(num_regions, at_once)), logits, tiles.num_warps,
        logits=read.data, target=wanted.data, regions=regions, partials=partials,
        batch=batch, N=N, num_regions=num_regions, ce_at=size,
        batch_stride=read.batch_stride, stride=read.stride,
        target_batch_stride=wanted.batch_stride, target_stride=wanted.stride,
        inverse_temperature=1 / temperature,
        C=C, CLASSES=tiles.classes, REGIONS=at_once, BLOCK=tiles.block, TILES=tiles.tiles,
        CHANNELS_LAST=read.channels_last, TARGET_CHANNELS_LAST=wanted.channels_last,
        ALIGNED=is_aligned(N, read, wanted), SQUARED=squared,
    )  # fmt: skip
    total = add_partials(partials)
    ce, dice = losses(total[:size], total[size:], C, first_class)
    return ce, dice, total[:size]


def backward(
    grad_ce: Tensor,  # [R]
    grad_dice: Tensor,  # [R]
    logits: Tensor,  # [B, C, *S]
    target: Tensor,  # [B, *S] labels or [B, C, *S] probabilities
    regions: Tensor | None,  # [B, *S]
    statistics: Tensor,
    num_regions: int,
    temperature: float,
    squared: bool,
    first_class: int,
) -> Tensor:  # [B, C, *S]
    read, gradient, written = with_gradient(logits)
    wanted = _read_as(target)
    batch, C, N = read.data.shape
    tiles = class_tiles(C)
    launch(
        _backward, (read.count_tiles(tiles.block),), logits, tiles.num_warps,
        table=derivatives(statistics, grad_ce, grad_dice, num_regions, C, squared, first_class),
        logits=read.data, target=wanted.data, regions=regions, gradient=written.data,
        batch=batch, N=N, num_regions=num_regions, batch_stride=read.batch_stride, stride=read.stride,
        target_batch_stride=wanted.batch_stride, target_stride=wanted.stride,
        gradient_batch_stride=written.batch_stride, gradient_stride=written.stride,
        inverse_temperature=1 / temperature, C=C, CLASSES=tiles.classes, BLOCK=tiles.block,
        CHANNELS_LAST=read.channels_last, TARGET_CHANNELS_LAST=wanted.channels_last,
        ALIGNED=is_aligned(N, read, wanted, written), SQUARED=squared,
    )  # fmt: skip
    return finish_gradient(gradient, written.data)
