"""Everything the prototypes do in a training step, in Triton.

    similarity[c] = max_k unit(z) . unit(p[c, k])
    ce, dice      of softmax_c(similarity[c] / class_temperature) against the labels, per region: class_losses.py
    info_nce      = mean of logsumexp_i(logit[i] / temperature) - logit[positive] / temperature
    cluster sums  of the embeddings, each voxel in the nearest cluster of its label's class; see cluster_sums.py

One read of the embeddings, and one more backward; but where C K d is large beside a tile's voxels, the
cluster sums take another one.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from semiseg_kernels.dice_ce import statistics_size
from semiseg_kernels.layouts import finish_gradient
from semiseg_kernels.reference.prototype_similarity import index_dtype
from semiseg_kernels.triton.class_losses import (
    add_statistics,
    class_gradient,
    derivatives,
    losses,
    no_statistics,
    read_derivatives,
    read_regions,
    softmax,
    store_statistics,
)
from semiseg_kernels.triton.cluster_sums import add_or_leave, assign, multiply
from semiseg_kernels.triton.configurations import prototype_tiles, regions_at_once
from semiseg_kernels.triton.launch import as_voxels, is_aligned, launch, with_gradient
from semiseg_kernels.triton.prototypes import (
    class_maxima,
    columns_of,
    contrast,
    contrast_gradient,
    contrast_logits,
    gradient_coefficients,
    nearest_prototype,
    positive_prototype,
    read_dots,
    restore_nan,
    scratch_memory,
    store_best,
    unit_prototypes,
    write_gradient,
)
from semiseg_kernels.triton.sums import add_partials, weighted_mean
from semiseg_kernels.triton.tiles import (
    class_offsets,
    count_tiles,
    locate,
    read_labels,
    read_weights,
    start,
    strides_of,
)

_SIZES = ["batch", "N", "num_regions", "ignore_prototype", "batch_stride", "stride"]


@triton.jit
def _contrast_voxels(
    dots,  # [BLOCK, columns]
    cosine,  # [BLOCK, columns]
    norm,  # [columns]
    flat,  # [1, columns]
    best,  # [BLOCK, CLASSES]
    winner,  # [BLOCK, CLASSES]
    label,  # [BLOCK, 1], negative where a voxel is left out
    ignore_prototype,
    inverse_temperature,
    K: tl.constexpr,
    NORMALIZE: tl.constexpr,
    POSITIVE_OF_LABEL: tl.constexpr,
):
    """The number of voxels in InfoNCE, and the sum of their losses."""
    positive = positive_prototype(best, winner, label, K, best.shape[1], POSITIVE_OF_LABEL)
    norms = tl.load(norm + tl.arange(0, dots.shape[1])[None, :])
    logits = contrast_logits(dots, cosine, norms, NORMALIZE)
    loss, _ = contrast(logits, flat, positive, inverse_temperature)
    contrasted = (label >= 0) & (positive != ignore_prototype)
    return tl.sum(contrasted.to(tl.float32)), tl.sum(tl.where(contrasted, loss, 0.0))


@triton.jit
def _add_class_losses(
    statistics,
    best,  # [BLOCK, CLASSES]
    label,  # [BLOCK, 1]
    region,  # [BLOCK, 1]
    first_region,
    inverse_class_temperature,
    SQUARED: tl.constexpr,
):
    """Add one tile's labelled voxels to the statistics of the class losses."""
    probability, surprise = softmax(restore_nan(best), inverse_class_temperature)
    y = (tl.arange(0, best.shape[1])[None, :] == label).to(tl.float32)
    return add_statistics(statistics, probability, surprise, y, region, label >= 0, first_region, SQUARED)


@triton.jit
def _cluster_weights(label, cluster, w, winner, PER_CLASS: tl.constexpr):
    """The sums [CLASSES, PER_CLASS] of the weights of the voxels in every cluster."""
    c = tl.arange(0, winner.shape[1])[None, :]
    # By class and winner: one row of all columns would be held by every thread.
    joined = winner[:, :, None] == tl.arange(0, PER_CLASS)[None, None, :]
    of_class = tl.where((c == label) & (cluster >= 0), w, 0.0)[:, :, None]
    return tl.sum(tl.where(joined, of_class, 0.0), axis=0)


@triton.jit(do_not_specialize=[*_SIZES, "contrast_at", "counts_at", "sums_size"])
def _forward(
    z,  # [B, D, N]
    unit,  # [D padded, CLASSES * PER_CLASS]
    norm,  # [CLASSES * PER_CLASS]
    labels,  # [B, N] or None
    regions,  # [B, N] or None
    weight,  # [B, N] or None
    similarity,  # [B, C, N] or None
    index,  # [B, C, N] or None
    cluster_map,  # [B, N] int16, or None where the cluster sums are taken at once or without labels
    factor_map,  # [B, N] float32, as the cluster map
    partials,  # [programs, sums_size], see `_Sums`
    contrast_at,
    counts_at,
    sums_size,
    batch,
    N,
    num_regions,
    ignore_prototype,
    batch_stride,
    stride,
    inverse_class_temperature,
    inverse_temperature,
    C: tl.constexpr,
    K: tl.constexpr,
    D: tl.constexpr,
    CLASSES: tl.constexpr,
    PER_CLASS: tl.constexpr,
    REGIONS: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
    TILES: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    ALIGNED: tl.constexpr,
    SQUARED: tl.constexpr,
    NORMALIZE: tl.constexpr,
    POSITIVE_OF_LABEL: tl.constexpr,
    UNIT_LENGTH: tl.constexpr,
    REQUIRE_AGREEMENT: tl.constexpr,
):
    N, batch_stride, stride = strides_of((N, batch_stride, stride), ALIGNED)
    program = tl.program_id(0)
    first_region = tl.program_id(1) * REGIONS
    row = partials + tl.cast(program, tl.int64) * sums_size
    flat = columns_of(C, K, CLASSES, PER_CLASS)
    statistics = no_statistics(REGIONS, CLASSES)
    counts = tl.zeros([CLASSES, PER_CLASS], tl.float32)
    contrasted, loss = 0.0, 0.0
    for tile in tl.range(program * TILES, (program + 1) * TILES, disable_licm=True, num_stages=1):
        image, first, inside = locate(tile, batch, N, BLOCK)
        x = start(z, image, first, batch_stride, stride, CHANNELS_LAST)
        dots, length = read_dots(x, unit, inside, stride, D, CHUNK, CLASSES * PER_CLASS, BLOCK, CHANNELS_LAST)
        cosine = dots / length
        best, winner = class_maxima(cosine, flat, CLASSES, PER_CLASS)
        if similarity is not None:
            exists = inside & (tl.arange(0, CLASSES)[None, :] < C)
            store_best(similarity, index, best, winner, class_offsets(image, first, N, C, CLASSES, BLOCK), exists)
        voxel = image * N + first + tl.arange(0, BLOCK)[:, None]
        label = read_labels(labels, voxel, inside, C)
        tile_contrasted, tile_loss = _contrast_voxels(
            dots, cosine, norm, flat, best, winner, label, ignore_prototype, inverse_temperature,
            K, NORMALIZE, POSITIVE_OF_LABEL,
        )  # fmt: skip
        contrasted += tile_contrasted
        loss += tile_loss
        if labels is not None:
            w = read_weights(weight, voxel, label >= 0)
            nearest = nearest_prototype(best, winner, K, CLASSES)
            cluster = assign(label, w, nearest, winner, K, CLASSES, REQUIRE_AGREEMENT)
            region = read_regions(regions, voxel, label >= 0)
            statistics = _add_class_losses(
                statistics, best, label, region, first_region, inverse_class_temperature, SQUARED
            )
            counts += _cluster_weights(label, cluster, w, winner, PER_CLASS)
            factor = w / length if UNIT_LENGTH else w
            add_or_leave(
                row + counts_at + C * K, cluster_map, factor_map, x, voxel, inside, cluster, factor, flat,
                stride, D, CHANNELS_LAST,
            )  # fmt: skip
    tl.store(row + contrast_at, contrasted)
    tl.store(row + contrast_at + 1, loss)
    if labels is not None:
        store_statistics(statistics, row, row + contrast_at + 2, first_region, num_regions, C)
        k = tl.arange(0, PER_CLASS)[None, :]
        at = tl.arange(0, CLASSES)[:, None] * K + k
        tl.store(row + counts_at + at, counts, mask=(at < C * K) & (k < K))


@triton.jit
def _class_losses_gradient(
    of_region,  # see `read_derivatives`
    best,  # [BLOCK, CLASSES]
    label,  # [BLOCK, 1]
    inverse_class_temperature,
    SQUARED: tl.constexpr,
):
    """d class losses / d best [BLOCK, CLASSES]."""
    probability, _ = softmax(restore_nan(best), inverse_class_temperature)
    y = (tl.arange(0, best.shape[1])[None, :] == label).to(tl.float32)
    return class_gradient(of_region, probability, y, label >= 0, inverse_class_temperature, SQUARED)


@triton.jit(do_not_specialize=[*_SIZES, "gradient_batch_stride", "gradient_stride"])
def _backward(
    grad_similarity,  # [B, C, N] or None
    grad_info_nce,  # [] float32 or None
    table,  # [R, 1 + 2 C] derivatives by the class losses, or None
    contrasted,  # [] float64: number of voxels in InfoNCE
    z,  # [B, D, N]
    unit,  # [D padded, CLASSES * PER_CLASS]
    norm,  # [CLASSES * PER_CLASS]
    labels,  # [B, N] or None
    regions,  # [B, N] or None
    gradient,  # [B, D, N]
    scratch,  # [programs, BLOCK, CLASSES * PER_CLASS] or None
    batch,
    N,
    num_regions,
    ignore_prototype,
    batch_stride,
    stride,
    gradient_batch_stride,
    gradient_stride,
    inverse_class_temperature,
    inverse_temperature,
    C: tl.constexpr,
    K: tl.constexpr,
    D: tl.constexpr,
    CLASSES: tl.constexpr,
    PER_CLASS: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    ALIGNED: tl.constexpr,
    SQUARED: tl.constexpr,
    NORMALIZE: tl.constexpr,
    POSITIVE_OF_LABEL: tl.constexpr,
):
    N, batch_stride, stride = strides_of((N, batch_stride, stride), ALIGNED)
    gradient_batch_stride, gradient_stride = strides_of((gradient_batch_stride, gradient_stride), ALIGNED)
    tiles = count_tiles(batch, N, BLOCK)
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), disable_licm=True, num_stages=1):
        image, first, inside = locate(tile, batch, N, BLOCK)
        x = start(z, image, first, batch_stride, stride, CHANNELS_LAST)
        target = start(gradient, image, first, gradient_batch_stride, gradient_stride, CHANNELS_LAST)
        voxel = image * N + first + tl.arange(0, BLOCK)[:, None]
        label = read_labels(labels, voxel, inside, C)
        if table is not None:
            of_region = read_derivatives(table, read_regions(regions, voxel, label >= 0), num_regions, C, CLASSES)
        dots, length = read_dots(x, unit, inside, stride, D, CHUNK, CLASSES * PER_CLASS, BLOCK, CHANNELS_LAST)
        cosine = dots / length
        flat = columns_of(C, K, CLASSES, PER_CLASS)
        best, winner = class_maxima(cosine, flat, CLASSES, PER_CLASS)
        by_class = tl.zeros([BLOCK, CLASSES], tl.float32)
        if grad_similarity is not None:
            at = grad_similarity + class_offsets(image, first, N, C, CLASSES, BLOCK)
            exists = inside & (tl.arange(0, CLASSES)[None, :] < C)
            by_class = tl.load(at, mask=exists, other=0).to(tl.float32)
        if table is not None:
            by_class += _class_losses_gradient(of_region, best, label, inverse_class_temperature, SQUARED)
        norms = tl.load(norm + tl.arange(0, CLASSES * PER_CLASS)[None, :])
        by_logit = tl.zeros([BLOCK, CLASSES * PER_CLASS], tl.float32)
        if grad_info_nce is not None:
            positive = positive_prototype(best, winner, label, K, CLASSES, POSITIVE_OF_LABEL)
            kept = (label >= 0) & (positive != ignore_prototype)
            logits = contrast_logits(dots, cosine, norms, NORMALIZE)
            by_logit = contrast_gradient(
                logits, flat, positive, kept, 1.0, grad_info_nce, contrasted, inverse_temperature
            )
        by_unit, by_z = gradient_coefficients(
            by_class, by_logit, cosine, winner, length, norms, NORMALIZE, CLASSES, PER_CLASS
        )
        write_gradient(
            target, x, unit, by_unit, by_z, length, inside, scratch, gradient_stride, stride, D, CHUNK, CHANNELS_LAST
        )  # fmt: skip


class _Sums(NamedTuple):
    """Where a program's sums begin, those of the class losses' statistics at 0."""

    contrast: int  # voxels and loss of InfoNCE
    cross_entropies: int
    cluster_counts: int
    cluster_sums: int
    size: int


def _sums(
    num_regions: int,  # 0 without labels
    num_classes: int,
    clusters: int,  # 0 without labels
    width: int,  # of the cluster sums, 0 where they take another read
) -> _Sums:
    contrast = statistics_size(num_regions, num_classes)
    cross_entropies = contrast + 2
    cluster_counts = cross_entropies + num_regions
    cluster_sums = cluster_counts + clusters
    return _Sums(contrast, cross_entropies, cluster_counts, cluster_sums, cluster_sums + clusters * width)


def forward(
    z: Tensor,  # [B, d, *S]
    prototypes: Tensor,  # [C, K, d]
    labels: Tensor | None,  # [B, *S]
    regions: Tensor | None,  # [B, *S]
    weight: Tensor | None,  # [B, *S]
    num_regions: int,
    class_temperature: float,
    temperature: float,
    squared: bool,
    return_similarity: bool,
    positive: str,
    normalize: bool,
    ignore_prototype: int,
    unit_length: bool,
    require_agreement: bool,
) -> tuple[Tensor, ...]:
    """similarity, index, ce, dice, info_nce, cluster_sum, cluster_count, statistics; some empty."""
    C, K, d = prototypes.shape
    read = as_voxels(z)
    batch, _, N = read.data.shape
    tiles = prototype_tiles(d, C, K, read.channels_last)
    unit, norm = unit_prototypes(prototypes, tiles)
    programs = read.count_programs(tiles.block, tiles.tiles)
    labelled = labels is not None
    regions_counted = num_regions if labelled else 0
    at_once = regions_at_once(regions_counted)

    def empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=z.device)

    shape = (batch, C, *z.shape[2:]) if return_similarity else (0,)
    similarity, index = empty(shape, z.dtype), empty(shape, index_dtype(K))
    maps = labelled and not tiles.fused
    cluster_map = empty((batch, N), torch.int16) if maps else None
    factor_map = empty((batch, N), torch.float32) if maps else None
    at = _sums(regions_counted, C, labelled * C * K, tiles.fused * d)
    partials = empty((programs, at.size), torch.float32)
    launch(
        _forward, (programs, max(triton.cdiv(regions_counted, at_once), 1)), z, tiles.num_warps,
        z=read.data, unit=unit, norm=norm, labels=labels, regions=regions, weight=weight,
        similarity=similarity if return_similarity else None, index=index if return_similarity else None,
        cluster_map=cluster_map, factor_map=factor_map, partials=partials,
        contrast_at=at.contrast, counts_at=at.cluster_counts, sums_size=at.size,
        batch=batch, N=N, num_regions=regions_counted, ignore_prototype=ignore_prototype,
        batch_stride=read.batch_stride, stride=read.stride,
        inverse_class_temperature=1 / class_temperature, inverse_temperature=1 / temperature,
        C=C, K=K, D=d, CLASSES=tiles.classes, PER_CLASS=tiles.per_class, REGIONS=at_once, BLOCK=tiles.block,
        CHUNK=tiles.chunk, TILES=tiles.tiles, CHANNELS_LAST=read.channels_last,
        ALIGNED=is_aligned(N, read), SQUARED=squared, NORMALIZE=normalize, POSITIVE_OF_LABEL=positive == "label",
        UNIT_LENGTH=unit_length, REQUIRE_AGREEMENT=require_agreement,
    )  # fmt: skip
    total = add_partials(partials)
    info_nce = weighted_mean(total[at.contrast : at.cross_entropies])
    statistics = total[: at.contrast + 1]
    if not labelled:
        ce, dice, cluster_sum = (empty((0,), torch.float32) for _ in range(3))
        return similarity, index, ce, dice, info_nce, cluster_sum, empty((0,), torch.float64), statistics
    ce, dice = losses(statistics, total[at.cross_entropies : at.cluster_counts], C)
    if cluster_map is None or factor_map is None:
        sums = total[at.cluster_sums :]
    else:
        sums = multiply(read, cluster_map, factor_map, C * K)
    cluster_count = total[at.cluster_counts : at.cluster_sums].clone().view(C, K)
    return similarity, index, ce, dice, info_nce, sums.float().view(C, K, d), cluster_count, statistics


def backward(
    grad_similarity: Tensor | None,  # [B, C, *S]
    grad_ce: Tensor | None,  # [R]
    grad_dice: Tensor | None,  # [R]
    grad_info_nce: Tensor | None,  # []
    z: Tensor,  # [B, d, *S]
    prototypes: Tensor,  # [C, K, d]
    labels: Tensor | None,  # [B, *S]
    regions: Tensor | None,  # [B, *S]
    statistics: Tensor,
    num_regions: int,
    class_temperature: float,
    temperature: float,
    squared: bool,
    positive: str,
    normalize: bool,
    ignore_prototype: int,
) -> Tensor:  # [B, d, *S]
    C, K, d = prototypes.shape
    read, gradient, written = with_gradient(z)
    batch, _, N = read.data.shape
    tiles = prototype_tiles(d, C, K, read.channels_last)
    unit, norm = unit_prototypes(prototypes, tiles)
    table = None
    if labels is not None and (grad_ce is not None or grad_dice is not None):
        table = derivatives(statistics, grad_ce, grad_dice, num_regions, C, squared)
    programs, scratch = scratch_memory(tiles, read.count_tiles(tiles.block), z)
    launch(
        _backward, (programs,), z, tiles.num_warps,
        grad_similarity=None if grad_similarity is None else grad_similarity.contiguous(),
        grad_info_nce=grad_info_nce, table=table, contrasted=statistics[-1],
        z=read.data, unit=unit, norm=norm, labels=labels, regions=regions,
        gradient=written.data, scratch=scratch,
        batch=batch, N=N, num_regions=num_regions, ignore_prototype=ignore_prototype,
        batch_stride=read.batch_stride, stride=read.stride,
        gradient_batch_stride=written.batch_stride, gradient_stride=written.stride,
        inverse_class_temperature=1 / class_temperature, inverse_temperature=1 / temperature,
        C=C, K=K, D=d, CLASSES=tiles.classes, PER_CLASS=tiles.per_class, BLOCK=tiles.block, CHUNK=tiles.gradient_chunk,
        CHANNELS_LAST=read.channels_last, ALIGNED=is_aligned(N, read, written),
        SQUARED=squared, NORMALIZE=normalize, POSITIVE_OF_LABEL=positive == "label",
    )  # fmt: skip
    return finish_gradient(gradient, written.data)
