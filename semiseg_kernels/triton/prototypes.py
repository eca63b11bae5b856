"""What the operations with prototypes share.

    unit(v) = v / max(|v|, EPSILON)
    cosine[c, k] = unit(z) . unit(p[c, k]),  best[c] = max_k cosine[c, k], reached first at winner[c]

Prototypes stand in columns c * PER_CLASS + k; CLASSES and PER_CLASS are C and K rounded up to powers of two.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from semiseg_kernels.reference import common
from semiseg_kernels.triton.configurations import PrototypeTiles, power_of_two
from semiseg_kernels.triton.launch import launch
from semiseg_kernels.triton.tiles import offsets

EPSILON = tl.constexpr(common.EPSILON)
INFINITY = tl.constexpr(float("inf"))
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
# Products of float32 on tensor cores: six products of bfloat16 parts are as exact as float32 arithmetic,
# three leave a relative error of 2^-16. The interpreter knows neither.
SIX_PARTS = tl.constexpr("ieee" if triton.knobs.runtime.interpret else "bf16x6")
THREE_PARTS = tl.constexpr("ieee" if triton.knobs.runtime.interpret else "bf16x3")
SCRATCH_COLUMNS = tl.constexpr(16)
NORMALIZED_AT_ONCE = 4096  # elements, in float64; more would spill


@triton.jit
def _normalize(
    prototypes,  # [C, K, D]
    unit,  # [WIDTH, CLASSES * PER_CLASS] float32, 0 in the padding
    norm,  # [CLASSES * PER_CLASS] float32, max(|p|, EPSILON)
    C: tl.constexpr,
    K: tl.constexpr,
    D: tl.constexpr,
    CLASSES: tl.constexpr,
    PER_CLASS: tl.constexpr,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)[:, None]
    c, k = column // PER_CLASS, column % PER_CLASS
    j = tl.arange(0, WIDTH)[None, :]
    exists = (c < C) & (k < K) & (j < D)
    p = tl.load(prototypes + (c * K + k) * D + j, mask=exists, other=0).to(tl.float64)
    length = tl.sqrt(tl.sum(p * p, axis=1, keep_dims=True))
    length = tl.where(length < EPSILON, EPSILON, length)
    tl.store(unit + j * (CLASSES * PER_CLASS) + column, (p / length).to(tl.float32))
    tl.store(norm + column, length.to(tl.float32))


def unit_prototypes(
    prototypes: Tensor,  # [C, K, d]
    tiles: PrototypeTiles,
) -> tuple[Tensor, Tensor]:  # unit [d padded, columns], norm [columns]
    """The prototypes at unit length, one a column, and their norms."""
    C, K, d = prototypes.shape
    columns, width = tiles.classes * tiles.per_class, power_of_two(max(d, tiles.gradient_chunk))
    at_once = min(columns, NORMALIZED_AT_ONCE // width)
    unit = torch.empty(width, columns, dtype=torch.float32, device=prototypes.device)
    norm = torch.empty(columns, dtype=torch.float32, device=prototypes.device)
    launch(
        _normalize, (columns // at_once,), prototypes, num_warps=8,
        prototypes=prototypes, unit=unit, norm=norm,
        C=C, K=K, D=d, CLASSES=tiles.classes, PER_CLASS=tiles.per_class, WIDTH=width, COLUMNS=at_once,
    )  # fmt: skip
    return unit, norm


@triton.jit
def columns_of(C: tl.constexpr, K: tl.constexpr, CLASSES: tl.constexpr, PER_CLASS: tl.constexpr):
    """The flat index c * K + k of every column [1, columns], -2 in the padding."""
    column = tl.arange(0, CLASSES * PER_CLASS)[None, :]
    c, k = column // PER_CLASS, column % PER_CLASS
    return tl.where((c < C) & (k < K), c * K + k, -2)


@triton.jit
def multiply_exactly(a, b, total):
    """total + a @ b for float32 b, as exact as float32 arithmetic; of b 6e-8 and less is lost where a is float16."""
    if INTERPRETED or a.dtype == tl.float32:  # the interpreter's product of bfloat16 is wrong
        return tl.dot(a.to(tl.float32), b, total, input_precision=SIX_PARTS)
    # The narrow factor is exact; b is the sum of parts of its dtype.
    for _ in tl.static_range(3 if a.dtype == tl.bfloat16 else 2):
        part = b.to(a.dtype)
        total = tl.dot(a, part, total)
        b -= part.to(tl.float32)
    return total


@triton.jit
def read_dots(
    z,  # at the tile's first voxel
    unit,  # [D padded, COLUMNS]
    inside,  # [BLOCK, 1]
    stride,
    D: tl.constexpr,
    CHUNK: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
):
    """z . unit(p) [BLOCK, COLUMNS] and max(|z|, EPSILON) [BLOCK, 1]."""
    voxel = tl.arange(0, BLOCK)[:, None]
    column = tl.arange(0, COLUMNS)[None, :]
    dots = tl.zeros([BLOCK, COLUMNS], tl.float32)
    square = tl.zeros([BLOCK, 1], tl.float32)
    if CHUNK == 1:
        at_once: tl.constexpr = 8 if COLUMNS <= 8 else 4  # more would spill
        for j in tl.range(0, D, loop_unroll_factor=at_once, disable_licm=True):
            x = tl.load(z + offsets(voxel, j, stride, CHANNELS_LAST), mask=inside, other=0).to(tl.float32)
            dots += x * tl.load(unit + j * COLUMNS + column)
            square += x * x
    else:
        for first in range(0, D, CHUNK):
            j = first + tl.arange(0, CHUNK)
            at = z + offsets(voxel, j[None, :], stride, CHANNELS_LAST)
            x = tl.load(at, mask=inside & (j[None, :] < D), other=0)
            dots = multiply_exactly(x, tl.load(unit + j[:, None] * COLUMNS + column), dots)
            wide = x.to(tl.float32)
            square += tl.sum(wide * wide, axis=1, keep_dims=True)
    length = tl.sqrt(square)
    return dots, tl.where(length < EPSILON, EPSILON, length)


@triton.jit
def class_maxima(cosine, flat, CLASSES: tl.constexpr, PER_CLASS: tl.constexpr):
    """best and winner [BLOCK, CLASSES]; best is infinite in place of NaN, and -infinite in the padding."""
    ranked = tl.where(flat >= 0, tl.where(cosine < INFINITY, cosine, INFINITY), -INFINITY)  # NaN first
    ranked = tl.reshape(ranked, [cosine.shape[0], CLASSES, PER_CLASS])
    return tl.max(ranked, axis=2, return_indices=True)


@triton.jit
def restore_nan(best):
    # Not a global constant: Triton would find that NaN has changed, as it is not equal to itself.
    return tl.where(best == INFINITY, float("nan"), best)


@triton.jit
def store_best(similarity, index, best, winner, at, exists):
    """Write best and winner to the places `at`, where those exist."""
    tl.store(similarity + at, restore_nan(best).to(similarity.dtype.element_ty), mask=exists)
    tl.store(index + at, winner.to(index.dtype.element_ty), mask=exists)


@triton.jit
def prototype_of(winner, chosen, K: tl.constexpr, CLASSES: tl.constexpr):
    """The flat index [BLOCK, 1] of the winner of the class `chosen` [BLOCK, 1]."""
    c = tl.arange(0, CLASSES)[None, :]
    return chosen * K + tl.sum(tl.where(c == chosen, winner, 0), axis=1, keep_dims=True)


@triton.jit
def nearest_prototype(best, winner, K: tl.constexpr, CLASSES: tl.constexpr):
    """The flat index [BLOCK, 1] of the nearest of all prototypes, the lowest on ties."""
    _, nearest_class = tl.max(best, axis=1, return_indices=True, keep_dims=True)
    return prototype_of(winner, nearest_class, K, CLASSES)


@triton.jit
def positive_prototype(best, winner, label, K: tl.constexpr, CLASSES: tl.constexpr, OF_LABEL: tl.constexpr):
    """The flat index [BLOCK, 1] of the nearest prototype of the label's class, or of all."""
    if OF_LABEL:
        return prototype_of(winner, tl.maximum(label, 0), K, CLASSES)
    else:
        return nearest_prototype(best, winner, K, CLASSES)


@triton.jit
def spread(of_class, CLASSES: tl.constexpr, PER_CLASS: tl.constexpr):
    """[BLOCK, CLASSES] -> [BLOCK, CLASSES * PER_CLASS], every class's value in all its columns."""
    block: tl.constexpr = of_class.shape[0]
    wide = tl.broadcast_to(of_class[:, :, None], [block, CLASSES, PER_CLASS])
    return tl.reshape(wide, [block, CLASSES * PER_CLASS])


@triton.jit
def contrast_logits(dots, cosine, norms, NORMALIZE: tl.constexpr):
    """The logits of InfoNCE: cosines, or z . p."""
    if NORMALIZE:
        return cosine
    else:
        return dots * norms


@triton.jit
def contrast(logits, flat, positive, inverse_temperature):
    """InfoNCE [BLOCK, 1] and the softmax [BLOCK, columns] of the logits over the temperature.

    loss = logsumexp_i(logit[i] / temperature) - logit[positive] / temperature
    """
    exists = flat >= 0
    top = tl.max(tl.where(exists, logits, -INFINITY), axis=1, keep_dims=True)
    exponential = tl.where(exists, tl.exp((logits - top) * inverse_temperature), 0.0)
    total = tl.sum(exponential, axis=1, keep_dims=True)
    of_positive = tl.sum(tl.where(flat == positive, logits, 0.0), axis=1, keep_dims=True)
    return tl.log(total) + (top - of_positive) * inverse_temperature, exponential / total


@triton.jit
def contrast_gradient(
    logits,  # [BLOCK, columns]
    flat,  # [1, columns]
    positive,  # [BLOCK, 1]
    kept,  # [BLOCK, 1]
    w,  # [BLOCK, 1] weights of the voxels, or 1
    grad_loss,  # [] float32, of their mean
    denominator,  # [] float64, sum of all weights
    inverse_temperature,
):
    """d loss / d logit [BLOCK, columns], 0 where not kept."""
    _, probability = contrast(logits, flat, positive, inverse_temperature)
    weights = tl.load(denominator)
    by_loss = (tl.load(grad_loss) / tl.where(weights == 0, 1.0, weights)).to(tl.float32)
    by_logit = (probability - (flat == positive).to(tl.float32)) * (w * (by_loss * inverse_temperature))
    return tl.where(kept, by_logit, 0.0)


@triton.jit
def gradient_coefficients(
    by_class,  # [BLOCK, CLASSES] d loss / d best
    by_logit,  # [BLOCK, columns] d loss / d logit
    cosine,  # [BLOCK, columns]
    winner,  # [BLOCK, CLASSES]
    length,  # [BLOCK, 1]
    norm,  # [1, columns]
    NORMALIZE: tl.constexpr,  # logits are cosines, else z . p
    CLASSES: tl.constexpr,
    PER_CLASS: tl.constexpr,
):
    """The coefficients of unit(p) and of z in the gradient, which is their combination over |z|.

    d cosine[i] / dz = (unit(p[i]) - cosine[i] unit(z)) / |z|, 0 for embeddings below EPSILON.
    """
    column = tl.arange(0, CLASSES * PER_CLASS)[None, :]
    chosen = spread(winner, CLASSES, PER_CLASS) == column % PER_CLASS
    by_cosine = tl.where(chosen, spread(by_class, CLASSES, PER_CLASS), 0.0)
    if NORMALIZE:
        by_cosine += by_logit
    by_cosine = tl.where(length > EPSILON, by_cosine, 0.0)
    along = tl.sum(by_cosine * cosine, axis=1, keep_dims=True)
    if NORMALIZE:
        return by_cosine, -along / length
    else:
        return by_cosine + by_logit * length * norm, -along / length


@triton.jit
def write_gradient(
    gradient,  # at the tile's first voxel
    z,  # at the tile's first voxel
    unit,  # [D padded, COLUMNS]
    by_unit,  # [BLOCK, COLUMNS] coefficients of unit(p)
    by_z,  # [BLOCK, 1] coefficient of z
    length,  # [BLOCK, 1]
    inside,  # [BLOCK, 1]
    scratch,  # [programs, BLOCK, COLUMNS], or None where a warp can hold by_unit
    gradient_stride,
    stride,
    D: tl.constexpr,
    CHUNK: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
):
    """(sum_i by_unit[i] unit(p[i]) + by_z z) / |z|, with z read once more, from the cache."""
    BLOCK: tl.constexpr = by_unit.shape[0]
    COLUMNS: tl.constexpr = by_unit.shape[1]
    voxel = tl.arange(0, BLOCK)[:, None]
    column = tl.arange(0, COLUMNS)
    inverse = 1 / length
    by_unit *= inverse
    by_z *= inverse
    if CHUNK == 1:
        for j in tl.range(0, D, loop_unroll_factor=8, disable_licm=True):
            x = tl.load(z + offsets(voxel, j, stride, CHANNELS_LAST), mask=inside, other=0).to(tl.float32)
            p = tl.load(unit + j * COLUMNS + column[None, :])
            total = tl.sum(by_unit * p, axis=1, keep_dims=True) + by_z * x
            target = gradient + offsets(voxel, j, gradient_stride, CHANNELS_LAST)
            tl.store(target, total.to(gradient.dtype.element_ty), mask=inside)
    else:
        # A gradient of 16 bits needs no more than three parts of the product.
        parts: tl.constexpr = SIX_PARTS if z.dtype.element_ty == tl.float32 else THREE_PARTS
        if scratch is not None:
            scratch += tl.cast(tl.program_id(0), tl.int64) * (BLOCK * COLUMNS) + voxel * COLUMNS
            tl.store(scratch + column[None, :], by_unit)
            tl.debug_barrier()
        for first in tl.range(0, D, CHUNK, disable_licm=True):
            j = first + tl.arange(0, CHUNK)[None, :]
            x = tl.load(z + offsets(voxel, j, stride, CHANNELS_LAST), mask=inside & (j < D), other=0)
            if scratch is None:
                total = tl.dot(by_unit, tl.load(unit + j * COLUMNS + column[:, None]), input_precision=parts)
            else:
                total = tl.zeros([BLOCK, CHUNK], tl.float32)
                for i in tl.range(0, COLUMNS, SCRATCH_COLUMNS, disable_licm=True):
                    some = i + tl.arange(0, SCRATCH_COLUMNS)
                    p = tl.load(unit + j * COLUMNS + some[:, None])
                    total = tl.dot(tl.load(scratch + some[None, :]), p, total, input_precision=parts)
            total += by_z * x.to(tl.float32)
            target = gradient + offsets(voxel, j, gradient_stride, CHANNELS_LAST)
            tl.store(target, total.to(gradient.dtype.element_ty), mask=inside & (j < D))
        if scratch is not None:
            tl.debug_barrier()


def scratch_memory(tiles: PrototypeTiles, count: int, like: Tensor) -> tuple[int, Tensor | None]:
    """How many programs write the gradient of `count` tiles, and their scratch memory, if any."""
    if tiles.programs is None:
        return count, None
    programs = min(tiles.programs, count)
    shape = (programs, tiles.block, tiles.classes * tiles.per_class)
    return programs, torch.empty(shape, dtype=torch.float32, device=like.device)
