"""Prototype similarity in Triton.

similarity[c] = max_k unit(z) . unit(p[c, k])
d similarity[c] / dz = (unit(p[c, winner]) - similarity[c] unit(z)) / |z|
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from semiseg_kernels.layouts import finish_gradient
from semiseg_kernels.reference.prototype_similarity import index_dtype
from semiseg_kernels.triton.configurations import prototype_tiles
from semiseg_kernels.triton.launch import as_voxels, is_aligned, launch, with_gradient
from semiseg_kernels.triton.prototypes import (
    class_maxima,
    columns_of,
    gradient_coefficients,
    read_dots,
    scratch_memory,
    store_best,
    unit_prototypes,
    write_gradient,
)
from semiseg_kernels.triton.tiles import class_offsets, count_tiles, locate, start, strides_of

_SIZES = ["batch", "N", "batch_stride", "stride", "gradient_batch_stride", "gradient_stride"]


@triton.jit(do_not_specialize=_SIZES[:4])
def _forward(
    z,  # [B, D, N]
    unit,  # [D padded, CLASSES * PER_CLASS]
    similarity,  # [B, C, N]
    index,  # [B, C, N]
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
    CHANNELS_LAST: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    N, batch_stride, stride = strides_of((N, batch_stride, stride), ALIGNED)
    image, first, inside = locate(tl.program_id(0), batch, N, BLOCK)
    z = start(z, image, first, batch_stride, stride, CHANNELS_LAST)
    dots, length = read_dots(z, unit, inside, stride, D, CHUNK, CLASSES * PER_CLASS, BLOCK, CHANNELS_LAST)
    flat = columns_of(C, K, CLASSES, PER_CLASS)
    best, winner = class_maxima(dots / length, flat, CLASSES, PER_CLASS)
    exists = inside & (tl.arange(0, CLASSES)[None, :] < C)
    store_best(similarity, index, best, winner, class_offsets(image, first, N, C, CLASSES, BLOCK), exists)


@triton.jit(do_not_specialize=_SIZES)
def _backward(
    grad_similarity,  # [B, C, N]
    z,  # [B, D, N]
    unit,  # [D padded, CLASSES * PER_CLASS]
    index,  # [B, C, N]
    gradient,  # [B, D, N]
    scratch,  # [programs, BLOCK, CLASSES * PER_CLASS] or None
    batch,
    N,
    batch_stride,
    stride,
    gradient_batch_stride,
    gradient_stride,
    C: tl.constexpr,
    D: tl.constexpr,
    CLASSES: tl.constexpr,
    PER_CLASS: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    N, batch_stride, stride = strides_of((N, batch_stride, stride), ALIGNED)
    gradient_batch_stride, gradient_stride = strides_of((gradient_batch_stride, gradient_stride), ALIGNED)
    tiles = count_tiles(batch, N, BLOCK)
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), disable_licm=True, num_stages=1):
        image, first, inside = locate(tile, batch, N, BLOCK)
        x = start(z, image, first, batch_stride, stride, CHANNELS_LAST)
        target = start(gradient, image, first, gradient_batch_stride, gradient_stride, CHANNELS_LAST)
        dots, length = read_dots(x, unit, inside, stride, D, CHUNK, CLASSES * PER_CLASS, BLOCK, CHANNELS_LAST)
        at = class_offsets(image, first, N, C, CLASSES, BLOCK)
        exists = inside & (tl.arange(0, CLASSES)[None, :] < C)
        by_class = tl.load(grad_similarity + at, mask=exists, other=0).to(tl.float32)
        winner = tl.load(index + at, mask=exists, other=0).to(tl.int32)
        by_unit, by_z = gradient_coefficients(
            by_class, 0.0, dots / length, winner, length, None, True, CLASSES, PER_CLASS
        )
        write_gradient(
            target, x, unit, by_unit, by_z, length, inside, scratch, gradient_stride, stride, D, CHUNK, CHANNELS_LAST
        )  # fmt: skip


def forward(
    z: Tensor,  # [B, d, *S]
    prototypes: Tensor,  # [C, K, d]
) -> tuple[Tensor, Tensor]:  # similarity, index: [B, C, *S]
    C, K, d = prototypes.shape
    shape = (z.shape[0], C, *z.shape[2:])
    similarity = torch.empty(shape, dtype=z.dtype, device=z.device)
    index = torch.empty(shape, dtype=index_dtype(K), device=z.device)
    read = as_voxels(z)
    batch, _, N = read.data.shape
    tiles = prototype_tiles(d, C, K, read.channels_last)
    unit, _ = unit_prototypes(prototypes, tiles)
    launch(
        _forward, (read.count_tiles(tiles.block),), z, tiles.num_warps,
        z=read.data, unit=unit, similarity=similarity, index=index,
        batch=batch, N=N, batch_stride=read.batch_stride, stride=read.stride,
        C=C, K=K, D=d, CLASSES=tiles.classes, PER_CLASS=tiles.per_class, BLOCK=tiles.block, CHUNK=tiles.chunk,
        CHANNELS_LAST=read.channels_last, ALIGNED=is_aligned(N, read),
    )  # fmt: skip
    return similarity, index


def backward(
    grad_similarity: Tensor,  # [B, C, *S]
    z: Tensor,  # [B, d, *S]
    prototypes: Tensor,  # [C, K, d]
    index: Tensor,  # [B, C, *S]
) -> Tensor:  # [B, d, *S]
    C, K, d = prototypes.shape
    read, gradient, written = with_gradient(z)
    batch, _, N = read.data.shape
    tiles = prototype_tiles(d, C, K, read.channels_last)
    unit, _ = unit_prototypes(prototypes, tiles)
    programs, scratch = scratch_memory(tiles, read.count_tiles(tiles.block), z)
    launch(
        _backward, (programs,), z, tiles.similarity_warps,
        grad_similarity=grad_similarity.contiguous(), z=read.data, unit=unit, index=index.contiguous(),
        gradient=written.data, scratch=scratch, batch=batch, N=N,
        batch_stride=read.batch_stride, stride=read.stride,
        gradient_batch_stride=written.batch_stride, gradient_stride=written.stride,
        C=C, D=d, CLASSES=tiles.classes, PER_CLASS=tiles.per_class, BLOCK=tiles.block, CHUNK=tiles.gradient_chunk,
        CHANNELS_LAST=read.channels_last, ALIGNED=is_aligned(N, read, written),
    )  # fmt: skip
    return finish_gradient(gradient, written.data)
