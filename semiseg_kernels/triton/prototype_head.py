"""Everything the prototypes do in a training step, in Triton.

    similarity[c] = max_k unit(z) . unit(p[c, k])
    ce, dice      of softmax_c(similarity[c] / class_temperature) against the labels, per region: classes.py
    info_nce      = mean of logsumexp_i(logit[i] / temperature) - logit[positive] / temperature
    cluster sums  of the embeddings, each voxel in the nearest cluster of its label's class; see clusters.py

One read of the embeddings, and one more backward; but where C K d is large beside a tile's voxels, the
cluster sums take another one.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from semiseg_kernels.native.extension import finish_gradient
from semiseg_kernels.reference.prototype_similarity import index_dtype
from semiseg_kernels.triton.classes import (
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
from semiseg_kernels.triton.clusters import add_embeddings, assign, multiply
from semiseg_kernels.triton.configurations import prototype_tiles, regions_at_once
from semiseg_kernels.triton.launching import as_voxels, is_aligned, launch, with_gradient
from semiseg_kernels.triton.prototypes import (
    class_maxima,
    columns_of,
    contrast,
    gradient_coefficients,
    nearest_prototype,
    prototype_of,
    read_dots,
    restore_nan,
    scratch_memory,
    unit_prototypes,
    write_gradient,
)
from semiseg_kernels.triton.sums import add_rows
from semiseg_kernels.triton.tiles import locate, read_labels, read_weights, start, stride_of

_SIZES = ["batch", "N", "num_regions", "ignore_prototype", "batch_stride", "stride"]


@triton.jit(do_not_specialize=_SIZES)
def _forward(
    z,  # [B, D, N]
    unit,  # [D padded, CLASSES * PER_CLASS]
    norm,  # [CLASSES * PER_CLASS]
    labels,  # [B, N] or None
    regions,  # [B, N] or None
    weight,  # [B, N] or None
    similarity,  # [B, C, N] or None
    index,  # [B, C, N] or None
    cluster_map,  # [B, N] int16, or None where FUSED or without labels
    factor_map,  # [B, N] float32, as the cluster map
    partials,  # [programs, sums], in the order of `forward`
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
    FUSED: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    ALIGNED: tl.constexpr,
    SQUARED: tl.constexpr,
    NORMALIZE: tl.constexpr,
    POSITIVE_OF_LABEL: tl.constexpr,
    UNIT_LENGTH: tl.constexpr,
    REQUIRE_AGREEMENT: tl.constexpr,
):
    N, stride, batch_stride = (
        stride_of(N, ALIGNED),
        stride_of(stride, ALIGNED),
        stride_of(batch_stride, ALIGNED),
    )
    program = tl.program_id(0)
    first_region = tl.program_id(1) * REGIONS
    flat = columns_of(C, K, CLASSES, PER_CLASS)
    c = tl.arange(0, CLASSES)[None, :]
    statistics_size = tl.cast(num_regions, tl.int64) * (1 + 3 * C)
    clusters_at = statistics_size + 2 + num_regions
    if labels is None:
        row = partials + tl.cast(program, tl.int64) * 2
    else:
        row = partials + tl.cast(program, tl.int64) * (clusters_at + (C * K * (1 + D) if FUSED else C * K))
    statistics = no_statistics(REGIONS, CLASSES)
    counts = tl.zeros([CLASSES, PER_CLASS], tl.float32)
    k = tl.arange(0, PER_CLASS)
    contrasted, loss = 0.0, 0.0
    for tile in tl.range(program * TILES, (program + 1) * TILES, disable_licm=True, num_stages=1):
        image, first, inside = locate(tile, batch, N, BLOCK)
        x = start(z, image, first, batch_stride, stride, CHANNELS_LAST)
        logits, length = read_dots(
            x, unit, inside, stride, D, CHUNK, CLASSES * PER_CLASS, BLOCK, CHANNELS_LAST
        )
        cosine = logits / length
        best, winner = class_maxima(cosine, flat, CLASSES, PER_CLASS)
        nearest = nearest_prototype(best, winner, K, CLASSES)
        best = restore_nan(best)
        lane = tl.arange(0, BLOCK)[:, None]
        if similarity is not None:
            at = (image * C + c) * N + first + lane
            tl.store(similarity + at, best.to(similarity.dtype.element_ty), mask=inside & (c < C))
            tl.store(index + at, winner.to(index.dtype.element_ty), mask=inside & (c < C))
        kept, positive = inside, nearest
        voxel = image * N + first + lane
        if labels is not None:
            label = read_labels(labels, voxel, inside, C)
            kept = label >= 0
            if POSITIVE_OF_LABEL:
                positive = prototype_of(winner, tl.maximum(label, 0), K, CLASSES)
        if NORMALIZE:
            logits = cosine
        else:
            logits *= tl.load(norm + tl.arange(0, CLASSES * PER_CLASS)[None, :])
        voxel_loss, _ = contrast(logits, flat, positive, inverse_temperature)
        in_contrast = kept & (positive != ignore_prototype)
        contrasted += tl.sum(in_contrast.to(tl.float32))
        loss += tl.sum(tl.where(in_contrast, voxel_loss, 0.0))
        if labels is not None:
            w = read_weights(weight, voxel, kept)
            cluster = assign(label, w, nearest, winner, K, CLASSES, REQUIRE_AGREEMENT)
            region = read_regions(regions, voxel, kept)
            probability, surprise = softmax(best, inverse_class_temperature)
            y = (c == label).to(tl.float32)
            statistics = add_statistics(statistics, probability, surprise, y, region, kept, first_region, SQUARED)
            # By class and winner: one row of all columns would be held by every thread.
            joined = winner[:, :, None] == k[None, None, :]
            of_class = tl.where((c == label) & (cluster >= 0), w, 0.0)[:, :, None]
            counts += tl.sum(tl.where(joined, of_class, 0.0), axis=0)
            factor = w / length if UNIT_LENGTH else w
            if FUSED:
                add_embeddings(row + clusters_at + C * K, x, cluster, factor, flat, stride, D, CHANNELS_LAST)
            else:
                tl.store(cluster_map + voxel, cluster.to(tl.int16), mask=inside)
                tl.store(factor_map + voxel, factor, mask=inside)
    if labels is None:
        tl.store(row, contrasted)
        tl.store(row + 1, loss)
    else:
        tl.store(row + statistics_size, contrasted)
        tl.store(row + statistics_size + 1, loss)
        store_statistics(statistics, row, row + statistics_size + 2, first_region, num_regions, C)
        at = tl.arange(0, CLASSES)[:, None] * K + k[None, :]
        tl.store(row + clusters_at + at, counts, mask=(at < C * K) & (k[None, :] < K))


@triton.jit
def _mean(
    sums,  # [2] float64: number and total
    mean,  # [] float32, 0 of no number
):
    number = tl.load(sums)
    tl.store(mean, (tl.load(sums + 1) / tl.where(number == 0, 1.0, number)).to(tl.float32))


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
    N, stride, batch_stride = (
        stride_of(N, ALIGNED),
        stride_of(stride, ALIGNED),
        stride_of(batch_stride, ALIGNED),
    )
    gradient_stride = stride_of(gradient_stride, ALIGNED)
    gradient_batch_stride = stride_of(gradient_batch_stride, ALIGNED)
    tiles = batch * ((N + BLOCK - 1) // BLOCK).to(tl.int32)
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), disable_licm=True, num_stages=1):
        image, first, inside = locate(tile, batch, N, BLOCK)
        x = start(z, image, first, batch_stride, stride, CHANNELS_LAST)
        target = start(gradient, image, first, gradient_batch_stride, gradient_stride, CHANNELS_LAST)
        c = tl.arange(0, CLASSES)[None, :]
        lane = tl.arange(0, BLOCK)[:, None]
        voxel = image * N + first + lane
        kept = inside
        label = tl.zeros([BLOCK, 1], tl.int32)
        if labels is not None:
            label = read_labels(labels, voxel, inside, C)
            kept = label >= 0
        if table is not None:
            of_region = read_derivatives(table, read_regions(regions, voxel, kept), num_regions, C, CLASSES)
        logits, length = read_dots(
            x, unit, inside, stride, D, CHUNK, CLASSES * PER_CLASS, BLOCK, CHANNELS_LAST
        )
        cosine = logits / length
        flat = columns_of(C, K, CLASSES, PER_CLASS)
        best, winner = class_maxima(cosine, flat, CLASSES, PER_CLASS)
        by_class = tl.zeros([BLOCK, CLASSES], tl.float32)
        if grad_similarity is not None:
            at = grad_similarity + (image * C + c) * N + first + lane
            by_class = tl.load(at, mask=inside & (c < C), other=0).to(tl.float32)
        if table is not None:
            probability, _ = softmax(restore_nan(best), inverse_class_temperature)
            y = (c == label).to(tl.float32)
            by_class += class_gradient(of_region, probability, y, kept, inverse_class_temperature, SQUARED)
        norms = tl.load(norm + tl.arange(0, CLASSES * PER_CLASS)[None, :])
        by_logit = tl.zeros([BLOCK, CLASSES * PER_CLASS], tl.float32)
        if grad_info_nce is not None:
            if POSITIVE_OF_LABEL:
                positive = prototype_of(winner, tl.maximum(label, 0), K, CLASSES)
            else:
                positive = nearest_prototype(best, winner, K, CLASSES)
            if NORMALIZE:
                logits = cosine
            else:
                logits *= norms
            _, probability = contrast(logits, flat, positive, inverse_temperature)
            number = tl.load(contrasted)
            by_loss = (tl.load(grad_info_nce) / tl.where(number == 0, 1.0, number)).to(
                tl.float32
            ) * inverse_temperature
            by_logit = (probability - (flat == positive).to(tl.float32)) * by_loss
            by_logit = tl.where(kept & (positive != ignore_prototype), by_logit, 0.0)
        by_unit, by_z = gradient_coefficients(
            by_class, by_logit, cosine, winner, length, norms, NORMALIZE, CLASSES, PER_CLASS
        )
        write_gradient(
            target,
            x,
            unit,
            by_unit,
            by_z,
            length,
            inside,
            scratch,
            gradient_stride,
            stride,
            D,
            CHUNK,
            CHANNELS_LAST,
        )


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
    programs = max(-(-batch * -(-N // tiles.block) // tiles.tiles), 1)
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
    # The sums: statistics, voxels and loss of InfoNCE, cross-entropies, cluster counts, cluster sums.
    statistics_size = regions_counted * (1 + 3 * C)
    counts_at = statistics_size + 2 + regions_counted
    sums_at = counts_at + labelled * C * K
    partials = empty((programs, sums_at + labelled * tiles.fused * C * K * d), torch.float32)
    launch(
        _forward, (programs, max(-(-regions_counted // at_once), 1)), z, tiles.num_warps,
        z=read.data, unit=unit, norm=norm, labels=labels, regions=regions, weight=weight,
        similarity=similarity if return_similarity else None, index=index if return_similarity else None,
        cluster_map=cluster_map, factor_map=factor_map, partials=partials,
        batch=batch, N=N, num_regions=regions_counted, ignore_prototype=ignore_prototype,
        batch_stride=read.batch_stride, stride=read.stride,
        inverse_class_temperature=1 / class_temperature, inverse_temperature=1 / temperature,
        C=C, K=K, D=d, CLASSES=tiles.classes, PER_CLASS=tiles.per_class, REGIONS=at_once, BLOCK=tiles.block,
        CHUNK=tiles.chunk, TILES=tiles.tiles, FUSED=tiles.fused, CHANNELS_LAST=read.channels_last,
        ALIGNED=is_aligned(N, read), SQUARED=squared, NORMALIZE=normalize, POSITIVE_OF_LABEL=positive == "label",
        UNIT_LENGTH=unit_length, REQUIRE_AGREEMENT=require_agreement,
    )  # fmt: skip
    total = add_rows(partials)
    info_nce = empty((), torch.float32)
    launch(_mean, (1,), z, num_warps=1, sums=total[statistics_size : statistics_size + 2], mean=info_nce)
    statistics = total[: statistics_size + 1]
    if not labelled:
        ce, dice, cluster_sum = (empty((0,), torch.float32) for _ in range(3))
        return similarity, index, ce, dice, info_nce, cluster_sum, empty((0,), torch.float64), statistics
    ce, dice = losses(statistics, total[statistics_size + 2 : counts_at], C)
    if cluster_map is None or factor_map is None:
        sums = total[sums_at:]
    else:
        sums = multiply(read, cluster_map, factor_map, C * K)
    cluster_count = total[counts_at:sums_at].clone().view(C, K)
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
    programs, scratch = scratch_memory(tiles, batch * -(-N // tiles.block), z)
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
