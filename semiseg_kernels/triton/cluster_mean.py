"""Cluster mean in Triton.

sum[c, k] = sum_v w z,  count[c, k] = sum_v w,
    over the voxels of label c whose nearest prototype of class c is k
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from semiseg_kernels.triton.cluster_sums import add_or_leave, assign, multiply
from semiseg_kernels.triton.configurations import prototype_tiles
from semiseg_kernels.triton.launch import as_voxels, is_aligned, launch
from semiseg_kernels.triton.prototypes import (
    class_maxima,
    columns_of,
    nearest_prototype,
    read_dots,
    unit_prototypes,
)
from semiseg_kernels.triton.sums import add_partials
from semiseg_kernels.triton.tiles import locate, read_labels, read_weights, start, strides_of


@triton.jit(do_not_specialize=["batch", "N", "batch_stride", "stride"])
def _forward(
    z,  # [B, D, N]
    unit,  # [D padded, CLASSES * PER_CLASS]
    labels,  # [B, N]
    weight,  # [B, N] or None
    cluster_map,  # [B, N] int16, or None where the sums are taken at once
    factor_map,  # [B, N] float32, as the cluster map
    partials,  # [programs, C * K (1 + D)], with the cluster map [programs, C * K]
    batch,
    N,
    batch_stride,
    stride,
    C: tl.constexpr,
    K: tl.constexpr,
    D: tl.constexpr,
    CLASSES: tl.constexpr,
    PER_CLASS: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
    TILES: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    ALIGNED: tl.constexpr,
    UNIT_LENGTH: tl.constexpr,
    REQUIRE_AGREEMENT: tl.constexpr,
):
    N, batch_stride, stride = strides_of((N, batch_stride, stride), ALIGNED)
    program = tl.program_id(0)
    flat = columns_of(C, K, CLASSES, PER_CLASS)
    row = partials + tl.cast(program, tl.int64) * (C * K * (1 + D) if cluster_map is None else C * K)
    counts = tl.zeros([1, CLASSES * PER_CLASS], tl.float32)
    for tile in tl.range(program * TILES, (program + 1) * TILES, disable_licm=True, num_stages=1):
        image, first, inside = locate(tile, batch, N, BLOCK)
        x = start(z, image, first, batch_stride, stride, CHANNELS_LAST)
        dots, length = read_dots(x, unit, inside, stride, D, CHUNK, CLASSES * PER_CLASS, BLOCK, CHANNELS_LAST)
        best, winner = class_maxima(dots / length, flat, CLASSES, PER_CLASS)
        voxel = image * N + first + tl.arange(0, BLOCK)[:, None]
        label = read_labels(labels, voxel, inside, C)
        w = read_weights(weight, voxel, label >= 0)
        nearest = nearest_prototype(best, winner, K, CLASSES)
        cluster = assign(label, w, nearest, winner, K, CLASSES, REQUIRE_AGREEMENT)
        counts += tl.sum(tl.where(cluster == flat, w, 0.0), axis=0, keep_dims=True)
        factor = w / length if UNIT_LENGTH else w
        add_or_leave(
            row + C * K, cluster_map, factor_map, x, voxel, inside, cluster, factor, flat, stride, D, CHANNELS_LAST
        )  # fmt: skip
    tl.store(row + flat, counts, mask=flat >= 0)


def forward(
    z: Tensor,  # [B, d, *S]
    prototypes: Tensor,  # [C, K, d]
    labels: Tensor,  # [B, *S]
    weight: Tensor | None,  # [B, *S]
    unit_length: bool,
    require_agreement: bool,
) -> tuple[Tensor, Tensor]:  # cluster_sum [C, K, d] float32, cluster_count [C, K] float64
    C, K, d = prototypes.shape
    read = as_voxels(z)
    batch, _, N = read.data.shape
    tiles = prototype_tiles(d, C, K, read.channels_last)
    unit, _ = unit_prototypes(prototypes, tiles)
    programs = read.count_programs(tiles.block, tiles.tiles)
    partials = torch.empty(
        programs, C * K * (1 + d) if tiles.fused else C * K, dtype=torch.float32, device=z.device
    )
    cluster_map = factor_map = None
    if not tiles.fused:
        cluster_map = torch.empty(batch, N, dtype=torch.int16, device=z.device)
        factor_map = torch.empty(batch, N, dtype=torch.float32, device=z.device)
    launch(
        _forward, (programs,), z, tiles.cluster_warps,
        z=read.data, unit=unit, labels=labels, weight=weight, cluster_map=cluster_map, factor_map=factor_map,
        partials=partials, batch=batch, N=N, batch_stride=read.batch_stride, stride=read.stride,
        C=C, K=K, D=d, CLASSES=tiles.classes, PER_CLASS=tiles.per_class, BLOCK=tiles.block, CHUNK=tiles.chunk,
        TILES=tiles.tiles, CHANNELS_LAST=read.channels_last, ALIGNED=is_aligned(N, read),
        UNIT_LENGTH=unit_length, REQUIRE_AGREEMENT=require_agreement,
    )  # fmt: skip
    total = add_partials(partials)
    if cluster_map is None or factor_map is None:
        sums = total[C * K :]
    else:
        sums = multiply(read, cluster_map, factor_map, C * K)
    return sums.float().view(C, K, d), total[: C * K].clone().view(C, K)
