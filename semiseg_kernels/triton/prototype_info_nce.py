"""Prototype InfoNCE in Triton.

    loss = sum_v w (logsumexp_i(logit[i] / temperature) - logit[positive] / temperature) / sum_v w,  v kept
    d loss / d logit[i] = w (softmax[i] - [i = positive]) / (temperature sum_v w)

logit = unit(z) . unit(p) or z . p. The positive is the prototype nearest by cosine, of the label's class
where labels are given.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from semiseg_kernels.layouts import finish_gradient
from semiseg_kernels.triton.configurations import prototype_tiles
from semiseg_kernels.triton.launch import as_voxels, is_aligned, launch, with_gradient
from semiseg_kernels.triton.prototypes import (
    class_maxima,
    columns_of,
    contrast,
    contrast_gradient,
    contrast_logits,
    gradient_coefficients,
    positive_prototype,
    read_dots,
    scratch_memory,
    unit_prototypes,
    write_gradient,
)
from semiseg_kernels.triton.sums import add_partials, weighted_mean
from semiseg_kernels.triton.tiles import count_tiles, locate, read_labels, read_weights, start, strides_of

_SIZES = ["batch", "N", "ignore_prototype", "batch_stride", "stride"]


@triton.jit
def _read_voxels(
    labels, weight, best, winner, voxel, inside, ignore_prototype, C, K: tl.constexpr, CLASSES: tl.constexpr
):
    """The positive and the weight of every voxel [BLOCK, 1], 0 where it is left out."""
    label = read_labels(labels, voxel, inside, C)
    positive = positive_prototype(best, winner, label, K, CLASSES, labels is not None)
    return positive, read_weights(weight, voxel, (label >= 0) & (positive != ignore_prototype))


@triton.jit(do_not_specialize=_SIZES)
def _forward(
    z,  # [B, D, N]
    unit,  # [D padded, CLASSES * PER_CLASS]
    norm,  # [CLASSES * PER_CLASS]
    labels,  # [B, N] or None
    weight,  # [B, N] or None
    partials,  # [programs, 2] weights and weighted losses
    batch,
    N,
    ignore_prototype,
    batch_stride,
    stride,
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
    NORMALIZE: tl.constexpr,
):
    N, batch_stride, stride = strides_of((N, batch_stride, stride), ALIGNED)
    image, first, inside = locate(tl.program_id(0), batch, N, BLOCK)
    z = start(z, image, first, batch_stride, stride, CHANNELS_LAST)
    dots, length = read_dots(z, unit, inside, stride, D, CHUNK, CLASSES * PER_CLASS, BLOCK, CHANNELS_LAST)
    cosine = dots / length
    flat = columns_of(C, K, CLASSES, PER_CLASS)
    best, winner = class_maxima(cosine, flat, CLASSES, PER_CLASS)
    voxel = image * N + first + tl.arange(0, BLOCK)[:, None]
    positive, w = _read_voxels(labels, weight, best, winner, voxel, inside, ignore_prototype, C, K, CLASSES)
    norms = tl.load(norm + tl.arange(0, CLASSES * PER_CLASS)[None, :])
    logits = contrast_logits(dots, cosine, norms, NORMALIZE)
    loss, _ = contrast(logits, flat, positive, inverse_temperature)
    row = partials + tl.program_id(0) * 2
    tl.store(row, tl.sum(w))
    tl.store(row + 1, tl.sum(tl.where(w != 0, w * loss, 0.0)))


@triton.jit(do_not_specialize=[*_SIZES, "gradient_batch_stride", "gradient_stride"])
def _backward(
    grad_loss,  # [] float32
    denominator,  # [] float64
    z,  # [B, D, N]
    unit,  # [D padded, CLASSES * PER_CLASS]
    norm,  # [CLASSES * PER_CLASS]
    labels,  # [B, N] or None
    weight,  # [B, N] or None
    gradient,  # [B, D, N]
    scratch,  # [programs, BLOCK, CLASSES * PER_CLASS] or None
    batch,
    N,
    ignore_prototype,
    batch_stride,
    stride,
    gradient_batch_stride,
    gradient_stride,
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
    NORMALIZE: tl.constexpr,
):
    N, batch_stride, stride = strides_of((N, batch_stride, stride), ALIGNED)
    gradient_batch_stride, gradient_stride = strides_of((gradient_batch_stride, gradient_stride), ALIGNED)
    tiles = count_tiles(batch, N, BLOCK)
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), disable_licm=True, num_stages=1):
        image, first, inside = locate(tile, batch, N, BLOCK)
        x = start(z, image, first, batch_stride, stride, CHANNELS_LAST)
        target = start(gradient, image, first, gradient_batch_stride, gradient_stride, CHANNELS_LAST)
        dots, length = read_dots(x, unit, inside, stride, D, CHUNK, CLASSES * PER_CLASS, BLOCK, CHANNELS_LAST)
        cosine = dots / length
        flat = columns_of(C, K, CLASSES, PER_CLASS)
        best, winner = class_maxima(cosine, flat, CLASSES, PER_CLASS)
        voxel = image * N + first + tl.arange(0, BLOCK)[:, None]
        positive, w = _read_voxels(
            labels, weight, best, winner, voxel, inside, ignore_prototype, C, K, CLASSES
        )
        norms = tl.load(norm + tl.arange(0, CLASSES * PER_CLASS)[None, :])
        logits = contrast_logits(dots, cosine, norms, NORMALIZE)
        by_logit = contrast_gradient(
            logits, flat, positive, w != 0, w, grad_loss, denominator, inverse_temperature
        )
        by_class = tl.zeros([BLOCK, CLASSES], tl.float32)
        by_unit, by_z = gradient_coefficients(
            by_class, by_logit, cosine, winner, length, norms, NORMALIZE, CLASSES, PER_CLASS
        )
        write_gradient(
            target, x, unit, by_unit, by_z, length, inside, scratch, gradient_stride, stride, D, CHUNK, CHANNELS_LAST
        )  # fmt: skip


def forward(
    z: Tensor,  # [B, d, *S]
    prototypes: Tensor,  # [C, K, d]
    labels: Tensor | None,  # [B, *S]
    weight: Tensor | None,  # [B, *S]
    temperature: float,
    normalize: bool,
    ignore_prototype: int,
) -> tuple[Tensor, Tensor]:  # loss float32, sum of the kept voxels' weights float64
    C, K, d = prototypes.shape
    read = as_voxels(z)
    batch, _, N = read.data.shape
    tiles = prototype_tiles(d, C, K, read.channels_last)
    unit, norm = unit_prototypes(prototypes, tiles)
    programs = max(read.count_tiles(tiles.block), 1)
    partials = torch.empty(programs, 2, dtype=torch.float32, device=z.device)
    launch(
        _forward, (programs,), z, tiles.num_warps,
        z=read.data, unit=unit, norm=norm, labels=labels, weight=weight, partials=partials,
        batch=batch, N=N, ignore_prototype=ignore_prototype,
        batch_stride=read.batch_stride, stride=read.stride,
        inverse_temperature=1 / temperature,
        C=C, K=K, D=d, CLASSES=tiles.classes, PER_CLASS=tiles.per_class, BLOCK=tiles.block, CHUNK=tiles.chunk,
        CHANNELS_LAST=read.channels_last, ALIGNED=is_aligned(N, read), NORMALIZE=normalize,
    )  # fmt: skip
    sums = add_partials(partials)
    return weighted_mean(sums), sums[0]


def backward(
    grad_loss: Tensor,  # []
    denominator: Tensor,  # []
    z: Tensor,  # [B, d, *S]
    prototypes: Tensor,  # [C, K, d]
    labels: Tensor | None,  # [B, *S]
    weight: Tensor | None,  # [B, *S]
    temperature: float,
    normalize: bool,
    ignore_prototype: int,
) -> Tensor:  # [B, d, *S]
    C, K, d = prototypes.shape
    read, gradient, written = with_gradient(z)
    batch, _, N = read.data.shape
    tiles = prototype_tiles(d, C, K, read.channels_last)
    unit, norm = unit_prototypes(prototypes, tiles)
    programs, scratch = scratch_memory(tiles, read.count_tiles(tiles.block), z)
    launch(
        _backward, (programs,), z, tiles.num_warps,
        grad_loss=grad_loss, denominator=denominator,
        z=read.data, unit=unit, norm=norm, labels=labels, weight=weight,
        gradient=written.data, scratch=scratch,
        batch=batch, N=N, ignore_prototype=ignore_prototype,
        batch_stride=read.batch_stride, stride=read.stride,
        gradient_batch_stride=written.batch_stride, gradient_stride=written.stride,
        inverse_temperature=1 / temperature,
        C=C, K=K, D=d, CLASSES=tiles.classes, PER_CLASS=tiles.per_class, BLOCK=tiles.block, CHUNK=tiles.gradient_chunk,
        CHANNELS_LAST=read.channels_last, ALIGNED=is_aligned(N, read, written), NORMALIZE=normalize,
    )  # fmt: skip
    return finish_gradient(gradient, written.data)
