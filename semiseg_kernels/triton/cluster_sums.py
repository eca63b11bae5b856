"""Sums over the voxels of every cluster: of the weights, and of the embeddings times a factor.

Where a tile's sums are few beside its embeddings they are taken while the tile is at hand. Else the tile
leaves every voxel's cluster and factor, 6 bytes, and a product [clusters, voxels] . [voxels, D] takes the sums.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from semiseg_kernels.triton.configurations import power_of_two
from semiseg_kernels.triton.launch import Voxels, is_aligned, launch
from semiseg_kernels.triton.prototypes import SIX_PARTS, prototype_of
from semiseg_kernels.triton.sums import add_partials
from semiseg_kernels.triton.tiles import count_tiles, locate, offsets, start, strides_of

CLUSTERS, CHANNELS, BLOCK = 64, 32, 32  # of a program of the product
PROGRAMS = 384  # of the product, to keep any GPU busy
CHANNELS_AT_ONCE = tl.constexpr(4)


@triton.jit
def assign(
    label, w, nearest, winner, K: tl.constexpr, CLASSES: tl.constexpr, REQUIRE_AGREEMENT: tl.constexpr
):
    """The flat index [BLOCK, 1] of a voxel's cluster, -1 for none."""
    cluster = prototype_of(winner, tl.maximum(label, 0), K, CLASSES)
    assigned = (label >= 0) & (w != 0)
    # The nearest of all has the label's class exactly where it is the nearest of that class.
    if REQUIRE_AGREEMENT:
        assigned &= cluster == nearest
    return tl.where(assigned, cluster, -1)


@triton.jit
def _add_embeddings(
    sums,  # [C * K, D] of this tile
    z,  # at the tile's first voxel
    cluster,  # [BLOCK, 1]
    factor,  # [BLOCK, 1]
    flat,  # [1, COLUMNS] flat index of a column, negative in the padding
    stride,
    D: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
):
    """The tile's sums of factor * z, with z read once more, from the cache."""
    voxel = tl.arange(0, cluster.shape[0])[:, None]
    assigned = cluster >= 0
    mine = cluster == flat
    for first in tl.static_range(0, D, CHANNELS_AT_ONCE):  # as many share the steps of one sum over the block
        j = first + tl.arange(0, CHANNELS_AT_ONCE)
        at = z + offsets(voxel, j[None, :], stride, CHANNELS_LAST)
        x = factor * tl.load(at, mask=assigned & (j[None, :] < D), other=0).to(tl.float32)
        total = tl.sum(tl.where(mine[:, None, :], x[:, :, None], 0.0), axis=0)
        tl.store(sums + flat * D + j[:, None], total, mask=(flat >= 0) & (j[:, None] < D))


@triton.jit
def add_or_leave(
    sums,  # [C * K, D] of this tile
    cluster_map,  # [B, N] int16, or None where the sums are taken at once
    factor_map,  # [B, N] float32, as the cluster map
    z,  # at the tile's first voxel
    voxel,  # [BLOCK, 1]
    inside,  # [BLOCK, 1]
    cluster,  # [BLOCK, 1]
    factor,  # [BLOCK, 1]
    flat,  # [1, COLUMNS]
    stride,
    D: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
):
    """Take the tile's sums, or leave what `multiply` takes them from."""
    if cluster_map is None:
        _add_embeddings(sums, z, cluster, factor, flat, stride, D, CHANNELS_LAST)
    else:
        tl.store(cluster_map + voxel, cluster.to(tl.int16), mask=inside)
        tl.store(factor_map + voxel, factor, mask=inside)


@triton.jit(do_not_specialize=["batch", "N", "batch_stride", "stride"])
def _multiply(
    z,  # [B, D, N]
    cluster,  # [B, N] int16, -1 for none
    factor,  # [B, N] float32
    partials,  # [programs, clusters, D] float64
    batch,
    N,
    batch_stride,
    stride,
    clusters,
    D,
    CLUSTERS: tl.constexpr,
    CHANNELS: tl.constexpr,
    BLOCK: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    N, batch_stride, stride = strides_of((N, batch_stride, stride), ALIGNED)
    i = tl.program_id(0) * CLUSTERS + tl.arange(0, CLUSTERS)[None, :]
    j = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)[:, None]
    program = tl.program_id(2)
    tiles = count_tiles(batch, N, BLOCK)
    total = tl.zeros([CHANNELS, CLUSTERS], tl.float64)
    for tile in range(program, tiles, tl.num_programs(2)):
        image, first, inside = locate(tile, batch, N, BLOCK)
        voxel = tl.arange(0, BLOCK)[:, None]
        at = image * N + first + voxel
        mine = tl.load(cluster + at, mask=inside, other=-1).to(tl.int32)
        share = tl.where(mine == i, tl.load(factor + at, mask=inside, other=0), 0.0)
        x = start(z, image, first, batch_stride, stride, CHANNELS_LAST)
        x += offsets(tl.trans(voxel), j, stride, CHANNELS_LAST)
        x = tl.load(x, mask=tl.trans(mine >= 0) & (j < D), other=0).to(tl.float32)
        total += tl.dot(x, share, input_precision=SIX_PARTS).to(tl.float64)
    row = partials + tl.cast(program, tl.int64) * clusters * D
    tl.store(row + i * D + j, total, mask=(i < clusters) & (j < D))


def multiply(
    read: Voxels,  # [B, d, N]
    cluster: Tensor,  # [B, N] int16, -1 for none
    factor: Tensor,  # [B, N]
    clusters: int,
) -> Tensor:  # [clusters * d] float64
    """Per cluster the sum of factor * z."""
    batch, d, N = read.data.shape
    channels = min(power_of_two(max(d, 16)), CHANNELS)
    grid = (triton.cdiv(clusters, CLUSTERS), triton.cdiv(d, channels))
    programs = min(max(PROGRAMS // (grid[0] * grid[1]), 1), max(read.count_tiles(BLOCK), 1))
    partials = torch.empty(programs, clusters * d, dtype=torch.float64, device=factor.device)
    launch(
        _multiply, (*grid, programs), factor, num_warps=4,
        z=read.data, cluster=cluster, factor=factor, partials=partials, batch=batch, N=N,
        batch_stride=read.batch_stride, stride=read.stride, clusters=clusters, D=d,
        CLUSTERS=CLUSTERS, CHANNELS=channels, BLOCK=BLOCK,
        CHANNELS_LAST=read.channels_last, ALIGNED=is_aligned(N, read),
    )  # fmt: skip
    return add_partials(partials)
