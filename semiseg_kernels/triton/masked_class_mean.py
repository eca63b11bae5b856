"""Masked class mean in Triton.

mean[c] = sum_v weight[c, v] z[v] / total[c],  total[c] = sum_v weight[c, v];  0 where total[c] = 0
grad_z[v] = sum_c weight[c, v] grad_mean[c] / total[c]
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from semiseg_kernels.native.extension import empty_gradient, finish_gradient
from semiseg_kernels.triton.configurations import mean_tiles
from semiseg_kernels.triton.launching import Voxels, as_voxels, is_aligned, launch
from semiseg_kernels.triton.prototypes import SIX_PARTS, THREE_PARTS
from semiseg_kernels.triton.sums import add_rows
from semiseg_kernels.triton.tiles import locate, offsets, start, stride_of

QUOTIENTS = 256  # of a program of _divide
_SIZES = ["batch", "N", "weight_batch_stride", "weight_stride"]


@triton.jit(do_not_specialize=[*_SIZES, "batch_stride", "stride"])
def _forward(
    z,  # [B, D, N]
    weight,  # [B, C, N]
    partials,  # [programs, C * D + C] of the embeddings, and of the weights
    batch,
    N,
    batch_stride,
    stride,
    weight_batch_stride,
    weight_stride,
    C: tl.constexpr,
    D: tl.constexpr,
    CLASSES: tl.constexpr,
    CHANNELS: tl.constexpr,
    BLOCK: tl.constexpr,
    TILES: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    WEIGHT_CHANNELS_LAST: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    N, stride, batch_stride = (
        stride_of(N, ALIGNED),
        stride_of(stride, ALIGNED),
        stride_of(batch_stride, ALIGNED),
    )
    weight_stride = stride_of(weight_stride, ALIGNED)
    weight_batch_stride = stride_of(weight_batch_stride, ALIGNED)
    # Programs of the same voxels are neighbours: what one of them reads, the others find in the cache.
    class_groups: tl.constexpr = (C + CLASSES - 1) // CLASSES
    groups: tl.constexpr = class_groups * ((D + CHANNELS - 1) // CHANNELS)
    program, group = tl.program_id(0) // groups, tl.program_id(0) % groups
    c = group % class_groups * CLASSES + tl.arange(0, CLASSES)[None, :]
    j = group // class_groups * CHANNELS + tl.arange(0, CHANNELS)[:, None]
    voxel = tl.arange(0, BLOCK)[:, None]
    summed = tl.zeros([CHANNELS, CLASSES], tl.float64)
    total = tl.zeros([1, CLASSES], tl.float64)
    tiles = batch * ((N + BLOCK - 1) // BLOCK).to(tl.int32)
    for tile in tl.range(
        program * TILES, tl.minimum((program + 1) * TILES, tiles), disable_licm=True, num_stages=1
    ):
        image, first, inside = locate(tile, batch, N, BLOCK)
        w = start(weight, image, first, weight_batch_stride, weight_stride, WEIGHT_CHANNELS_LAST)
        w += offsets(voxel, c, weight_stride, WEIGHT_CHANNELS_LAST)
        w = tl.load(w, mask=inside & (c < C), other=0).to(tl.float32)
        x = start(z, image, first, batch_stride, stride, CHANNELS_LAST)
        x += offsets(tl.trans(voxel), j, stride, CHANNELS_LAST)
        x = tl.load(x, mask=tl.trans(inside) & (j < D), other=0).to(tl.float32)
        summed += tl.dot(x, w, input_precision=SIX_PARTS).to(tl.float64)
        total += tl.sum(w, axis=0, keep_dims=True).to(tl.float64)
    row = partials + tl.cast(program, tl.int64) * (C * D + C)
    tl.store(row + c * D + j, summed.to(tl.float32), mask=(c < C) & (j < D))
    if group < class_groups:
        tl.store(row + C * D + c, total.to(tl.float32), mask=c < C)


@triton.jit(do_not_specialize=[*_SIZES, "gradient_batch_stride", "gradient_stride"])
def _backward(
    share,  # [C, D] float32, grad_mean / total
    weight,  # [B, C, N]
    gradient,  # [B, D, N]
    batch,
    N,
    weight_batch_stride,
    weight_stride,
    gradient_batch_stride,
    gradient_stride,
    C: tl.constexpr,
    D: tl.constexpr,
    CLASSES: tl.constexpr,
    CHANNELS: tl.constexpr,
    BLOCK: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    WEIGHT_CHANNELS_LAST: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    N, weight_stride, weight_batch_stride = (
        stride_of(N, ALIGNED),
        stride_of(weight_stride, ALIGNED),
        stride_of(weight_batch_stride, ALIGNED),
    )
    gradient_stride = stride_of(gradient_stride, ALIGNED)
    gradient_batch_stride = stride_of(gradient_batch_stride, ALIGNED)
    # A gradient of 16 bits needs no more than three parts of the product.
    parts: tl.constexpr = SIX_PARTS if gradient.dtype.element_ty == tl.float32 else THREE_PARTS
    groups: tl.constexpr = (D + CHANNELS - 1) // CHANNELS
    image, first, inside = locate(tl.program_id(0) // groups, batch, N, BLOCK)
    j = tl.program_id(0) % groups * CHANNELS + tl.arange(0, CHANNELS)[None, :]
    voxel = tl.arange(0, BLOCK)[:, None]
    weight = start(weight, image, first, weight_batch_stride, weight_stride, WEIGHT_CHANNELS_LAST)
    total = tl.zeros([BLOCK, CHANNELS], tl.float32)
    for first_class in tl.range(0, C, CLASSES, disable_licm=True):
        c = first_class + tl.arange(0, CLASSES)
        at = weight + offsets(voxel, c[None, :], weight_stride, WEIGHT_CHANNELS_LAST)
        w = tl.load(at, mask=inside & (c[None, :] < C), other=0).to(tl.float32)
        of_class = tl.load(share + c[:, None] * D + j, mask=(c[:, None] < C) & (j < D), other=0)
        total = tl.dot(w, of_class, total, input_precision=parts)
    target = start(gradient, image, first, gradient_batch_stride, gradient_stride, CHANNELS_LAST)
    target += offsets(voxel, j, gradient_stride, CHANNELS_LAST)
    tl.store(target, total.to(gradient.dtype.element_ty), mask=inside & (j < D))


@triton.jit(do_not_specialize=["size", "D"])
def _divide(
    rows,  # [C, D]
    total,  # [C] float64
    quotient,  # [C, D] float32, 0 where the total is
    size,  # C * D
    D,
    QUOTIENTS: tl.constexpr,
):
    at = tl.program_id(0) * QUOTIENTS + tl.arange(0, QUOTIENTS)
    divisor = tl.load(total + at // D, mask=at < size, other=0)
    kept = divisor != 0
    value = tl.load(rows + at, mask=kept, other=0).to(tl.float64) / tl.where(kept, divisor, 1)
    tl.store(quotient + at, value.to(tl.float32), mask=at < size)


def _over_total(
    rows: Tensor,  # [C, d]
    total: Tensor,  # [C]
) -> Tensor:  # [C, d] float32
    quotient = torch.empty(rows.shape, dtype=torch.float32, device=rows.device)
    size = rows.numel()
    launch(
        _divide, (-(-size // QUOTIENTS),), rows, num_warps=4,
        rows=rows, total=total, quotient=quotient, size=size, D=rows.shape[1], QUOTIENTS=QUOTIENTS,
    )  # fmt: skip
    return quotient


def _read_weight(
    weight: Tensor,  # [B, C, *S]
) -> Voxels:
    return as_voxels(weight.view(torch.uint8) if weight.dtype == torch.bool else weight)


def forward(
    z: Tensor,  # [B, d, *S]
    weight: Tensor,  # [B, C, *S]
) -> tuple[Tensor, Tensor]:  # mean [C, d] float32, sums of the weights [C] float64
    C, d = weight.shape[1], z.shape[1]
    read, weights = as_voxels(z), _read_weight(weight)
    batch, _, N = read.data.shape
    tiles = mean_tiles(d, C)
    programs = max(-(-batch * -(-N // tiles.forward_block) // tiles.tiles), 1)
    groups = -(-C // tiles.classes) * -(-d // tiles.channels)
    partials = torch.empty(programs, C * d + C, dtype=torch.float32, device=z.device)
    launch(
        _forward, (programs * groups,), z, num_warps=4,
        z=read.data, weight=weights.data, partials=partials,
        batch=batch, N=N, batch_stride=read.batch_stride, stride=read.stride,
        weight_batch_stride=weights.batch_stride, weight_stride=weights.stride,
        C=C, D=d, CLASSES=tiles.classes, CHANNELS=tiles.channels, BLOCK=tiles.forward_block, TILES=tiles.tiles,
        CHANNELS_LAST=read.channels_last, WEIGHT_CHANNELS_LAST=weights.channels_last,
        ALIGNED=is_aligned(N, read, weights),
    )  # fmt: skip
    sums = add_rows(partials)
    total = sums[C * d :].clone()
    return _over_total(sums[: C * d].view(C, d), total), total


def backward(
    grad_mean: Tensor,  # [C, d]
    total: Tensor,  # [C]
    z: Tensor,  # [B, d, *S]
    weight: Tensor,  # [B, C, *S]
) -> Tensor:  # [B, d, *S]
    C, d = grad_mean.shape
    gradient, flat = empty_gradient(z)
    written, weights = as_voxels(flat), _read_weight(weight)
    batch, _, N = flat.shape
    tiles = mean_tiles(d, C)
    groups = -(-d // tiles.channels)
    launch(
        _backward, (batch * -(-N // tiles.backward_block) * groups,), z, num_warps=4,
        share=_over_total(grad_mean.contiguous(), total.contiguous()), weight=weights.data, gradient=written.data,
        batch=batch, N=N, weight_batch_stride=weights.batch_stride, weight_stride=weights.stride,
        gradient_batch_stride=written.batch_stride, gradient_stride=written.stride,
        C=C, D=d, CLASSES=tiles.classes, CHANNELS=tiles.channels, BLOCK=tiles.backward_block,
        CHANNELS_LAST=written.channels_last, WEIGHT_CHANNELS_LAST=weights.channels_last,
        ALIGNED=is_aligned(N, written, weights),
    )  # fmt: skip
    return finish_gradient(gradient, written.data)
