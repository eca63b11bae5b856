"""Cross-entropy and Dice of p = softmax_c(logit[c] / temperature), per region of a region map.

    ce[r]   = mean over the kept voxels of region r of -sum_c y[c] log p[c]
    dice[r] = 1 - mean_c (2 I + s) / (P + Y + s),
    I = sum p[c] y[c],  P = sum p[c]^2,  Y = sum y[c]^2,  s = DICE_SMOOTH

P and Y are sums of p[c] and y[c] where the denominator is not SQUARED; Dice's mean may begin with a later class, FIRST.

Statistics of a region: number of kept voxels, I [C], P [C], Y [C]. A program counts REGIONS of them.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from semiseg_kernels.reference.dice_ce import DICE_SMOOTH
from semiseg_kernels.triton.configurations import power_of_two
from semiseg_kernels.triton.launch import launch
from semiseg_kernels.triton.tiles import offsets

SMOOTH = tl.constexpr(DICE_SMOOTH)


@triton.jit
def read_classes(x, inside, stride, C: tl.constexpr, CLASSES: tl.constexpr, CHANNELS_LAST: tl.constexpr):
    """[BLOCK, CLASSES] of x, which points at the tile's first voxel; 0 in the padding."""
    voxel = tl.arange(0, inside.shape[0])[:, None]
    c = tl.arange(0, CLASSES)[None, :]
    at = x + offsets(voxel, c, stride, CHANNELS_LAST)
    return tl.load(at, mask=inside & (c < C), other=0).to(tl.float32)


@triton.jit
def softmax(logits, inverse_temperature):
    """p [BLOCK, CLASSES] and -log p [BLOCK, CLASSES]; logits are -infinite in the padding."""
    below = (tl.max(logits, axis=1, keep_dims=True) - logits) * inverse_temperature
    exponential = tl.exp(-below)
    total = tl.sum(exponential, axis=1, keep_dims=True)
    return exponential / total, tl.log(total) + below


@triton.jit
def read_regions(regions, voxel, kept):
    """Every voxel's region [BLOCK, 1], 0 without a region map."""
    if regions is None:
        return tl.zeros_like(voxel).to(tl.int32)
    else:
        return tl.load(regions + voxel, mask=kept, other=0).to(tl.int32)


@triton.jit
def no_statistics(REGIONS: tl.constexpr, CLASSES: tl.constexpr):
    """0 voxels and cross-entropy [REGIONS, 1], 0 overlap, prediction and target [REGIONS, CLASSES]."""
    return (
        tl.zeros([REGIONS, 1], tl.float32),
        tl.zeros([REGIONS, 1], tl.float32),
        tl.zeros([REGIONS, CLASSES], tl.float32),
        tl.zeros([REGIONS, CLASSES], tl.float32),
        tl.zeros([REGIONS, CLASSES], tl.float32),
    )


@triton.jit
def _add(sums, r: tl.constexpr, values, here):
    """Add values [BLOCK, n] of the voxels `here` to row r of sums [REGIONS, n]."""
    row = tl.sum(tl.where(here, values, 0.0), axis=0, keep_dims=True)
    return sums + tl.where(tl.arange(0, sums.shape[0])[:, None] == r, row, 0.0)


@triton.jit
def in_size(p, SQUARED: tl.constexpr):
    """P is the sum of p in_size(p), Y that of y in_size(y)."""
    if SQUARED:
        return p
    else:
        return tl.full(p.shape, 1.0, tl.float32)


@triton.jit
def add_statistics(
    statistics, probability, surprise, y, region, kept, first_region, SQUARED: tl.constexpr
):  # fmt: skip
    """Add one tile's voxels; surprise is -log p, and y the target [BLOCK, CLASSES]."""
    number, ce, overlap, predicted, target = statistics
    cross_entropy = tl.sum(tl.where(y != 0, surprise, 0.0) * y, axis=1, keep_dims=True)
    for r in tl.static_range(number.shape[0]):
        here = kept & (region == first_region + r)
        number = _add(number, r, here.to(tl.float32), here)
        ce = _add(ce, r, cross_entropy, here)
        overlap = _add(overlap, r, probability * y, here)
        predicted = _add(predicted, r, probability * in_size(probability, SQUARED), here)
        target = _add(target, r, y * in_size(y, SQUARED), here)
    return number, ce, overlap, predicted, target


@triton.jit
def store_statistics(statistics, row, ce_sums, first_region, num_regions, C: tl.constexpr):
    """Write the statistics to `row` [R, 1 + 3 C], and the cross-entropies to `ce_sums` [R]."""
    number, ce, overlap, predicted, target = statistics
    r = first_region + tl.arange(0, number.shape[0])[:, None]
    c = tl.arange(0, overlap.shape[1])[None, :]
    at = row + r * (1 + 3 * C)
    tl.store(ce_sums + r, ce, mask=r < num_regions)
    tl.store(at, number, mask=r < num_regions)
    inside = (r < num_regions) & (c < C)
    tl.store(at + 1 + c, overlap, mask=inside)
    tl.store(at + 1 + C + c, predicted, mask=inside)
    tl.store(at + 1 + 2 * C + c, target, mask=inside)


@triton.jit
def _read_statistics(statistics, r, C: tl.constexpr, CLASSES: tl.constexpr):
    """Number of voxels, and 2 I + s, P + Y + s [CLASSES], of region r."""
    c = tl.arange(0, CLASSES)
    row = statistics + r * (1 + 3 * C)
    overlap = tl.load(row + 1 + c, mask=c < C, other=0)
    predicted = tl.load(row + 1 + C + c, mask=c < C, other=0)
    target = tl.load(row + 1 + 2 * C + c, mask=c < C, other=0)
    return tl.load(row), 2 * overlap + SMOOTH, predicted + target + SMOOTH


@triton.jit
def _losses(
    statistics,  # [R, 1 + 3 C] float64
    ce_sums,  # [R] float64
    ce,  # [R] float32
    dice,  # [R] float32
    C: tl.constexpr,
    CLASSES: tl.constexpr,
    FIRST: tl.constexpr,
):
    r = tl.program_id(0)
    number, numerator, denominator = _read_statistics(statistics, r, C, CLASSES)
    c = tl.arange(0, CLASSES)
    score = tl.sum(tl.where((c >= FIRST) & (c < C), numerator / denominator, 0.0), axis=0) / (C - FIRST)
    tl.store(dice + r, (1 - score).to(tl.float32))
    mean = tl.load(ce_sums + r) / tl.where(number == 0, 1.0, number)
    tl.store(ce + r, mean.to(tl.float32))


def losses(
    statistics: Tensor,  # [R * (1 + 3 C)] float64
    ce_sums: Tensor,  # [R] float64
    num_classes: int,
    first_class: int = 0,  # of those in Dice
) -> tuple[Tensor, Tensor]:  # ce [R], dice [R]
    """Cross-entropy and Dice of every region, 0 where it has no voxel."""
    ce = torch.empty(ce_sums.shape, dtype=torch.float32, device=ce_sums.device)
    dice = torch.empty_like(ce)
    launch(
        _losses, ce.shape, ce, num_warps=1, statistics=statistics, ce_sums=ce_sums, ce=ce, dice=dice,
        C=num_classes, CLASSES=power_of_two(num_classes), FIRST=first_class,
    )  # fmt: skip
    return ce, dice


@triton.jit
def _derivatives(
    statistics,  # [R, 1 + 3 C] float64
    grad_ce,  # [R] or None
    grad_dice,  # [R] or None
    table,  # [R, 1 + 2 C] float32
    C: tl.constexpr,
    CLASSES: tl.constexpr,
    FIRST: tl.constexpr,
    SQUARED: tl.constexpr,
):
    r = tl.program_id(0)
    number, numerator, denominator = _read_statistics(statistics, r, C, CLASSES)
    c = tl.arange(0, CLASSES)
    row = table + r * (1 + 2 * C)
    by_ce = number * 0
    if grad_ce is not None:
        by_ce = tl.where(number == 0, 0.0, tl.load(grad_ce + r) / tl.where(number == 0, 1.0, number))
    scale = tl.zeros_like(denominator)
    if grad_dice is not None:
        gradient = tl.load(grad_dice + r).to(tl.float64)
        # 0 of a loss that is not differentiated, also where its sums are NaN.
        scale = tl.where(c >= FIRST, -2 * gradient / ((C - FIRST) * denominator), 0.0)
        scale = tl.where(gradient == 0, 0.0, scale)
    by_size = tl.where(scale == 0, 0.0, -scale * numerator / denominator)
    if not SQUARED:
        by_size /= 2
    tl.store(row, by_ce.to(tl.float32))
    tl.store(row + 1 + c, scale.to(tl.float32), mask=c < C)
    tl.store(row + 1 + C + c, by_size.to(tl.float32), mask=c < C)


def derivatives(
    statistics: Tensor,  # [R * (1 + 3 C)] float64
    grad_ce: Tensor | None,  # [R]
    grad_dice: Tensor | None,  # [R]
    num_regions: int,
    num_classes: int,
    squared: bool,
    first_class: int = 0,  # of those in Dice
) -> Tensor:  # [R, 1 + 2 C]
    """Per region the derivative by a voxel's cross-entropy, per class those by p y and, halved, p in_size(p).

    Not squared, the last is not halved.
    """
    table = torch.empty(num_regions, 1 + 2 * num_classes, dtype=torch.float32, device=statistics.device)
    launch(
        _derivatives, (num_regions,), table, num_warps=1, statistics=statistics, grad_ce=grad_ce,
        grad_dice=grad_dice, table=table, C=num_classes, CLASSES=power_of_two(num_classes),
        FIRST=first_class, SQUARED=squared,
    )  # fmt: skip
    return table


@triton.jit
def read_derivatives(table, region, num_regions, C: tl.constexpr, CLASSES: tl.constexpr):
    """Every voxel's row of `derivatives`: [BLOCK, 1], twice [BLOCK, CLASSES], 0 without a region."""
    c = tl.arange(0, CLASSES)[None, :]
    by_ce = tl.zeros([region.shape[0], 1], tl.float32)
    by_overlap = tl.zeros([region.shape[0], CLASSES], tl.float32)
    by_size = by_overlap
    for r in range(num_regions):  # a few uniform loads: to gather each voxel's row would cost more
        row = table + r * (1 + 2 * C)
        here = region == r
        by_ce = tl.where(here, tl.load(row), by_ce)
        by_overlap = tl.where(here, tl.load(row + 1 + c, mask=c < C, other=0), by_overlap)
        by_size = tl.where(here, tl.load(row + 1 + C + c, mask=c < C, other=0), by_size)
    return by_ce, by_overlap, by_size


@triton.jit
def class_gradient(of_region, probability, y, kept, inverse_temperature, SQUARED: tl.constexpr):
    """d loss / d logit [BLOCK, CLASSES], 0 where not kept; of_region: see `read_derivatives`."""
    by_ce, by_overlap, by_size = of_region
    by_p = y * by_overlap + by_size * in_size(probability, SQUARED)
    mean = tl.sum(probability * by_p, axis=1, keep_dims=True)
    total = tl.sum(y, axis=1, keep_dims=True)
    by_logit = probability * (by_p - mean) + by_ce * (probability * total - y)
    return tl.where(kept, by_logit * inverse_temperature, 0.0)
