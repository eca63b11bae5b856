"""Products of maps of classes with the channels of voxels: sums over voxels by class, and mixtures of rows by class.

sums[c, j] = sum_v weight[c, v] z[j, v],  totals[c] = sum_v weight[c, v],  over the voxels of every image
mixture[j, v] = sum_c weight[c, v] share[c, j] + bias[j]
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from semiseg_kernels.triton.configurations import ClassProductTiles, class_product_tiles
from semiseg_kernels.triton.launch import Voxels, is_aligned, launch
from semiseg_kernels.triton.prototypes import SIX_PARTS, THREE_PARTS
from semiseg_kernels.triton.sums import add_partials
from semiseg_kernels.triton.tiles import locate, offsets, start, strides_of

_SIZES = ["batch", "N", "weight_batch_stride", "weight_stride"]


@triton.jit(do_not_specialize=[*_SIZES, "batch_stride", "stride", "images", "tiles_of_program"])
def _sum(
    z,  # [B, D, N]
    weight,  # [B, C, N]
    partials,  # [programs of an image, B, C * D + C]: of the products, and of the weights
    batch,
    images,  # batch, at least 1
    N,
    batch_stride,
    stride,
    weight_batch_stride,
    weight_stride,
    tiles_of_program,
    C: tl.constexpr,
    D: tl.constexpr,
    CLASSES: tl.constexpr,
    CHANNELS: tl.constexpr,
    BLOCK: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    WEIGHT_CHANNELS_LAST: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    N, batch_stride, stride = strides_of((N, batch_stride, stride), ALIGNED)
    weight_batch_stride, weight_stride = strides_of((weight_batch_stride, weight_stride), ALIGNED)
    # Programs of the same voxels are neighbours: what one of them reads, the others find in the cache.
    class_groups: tl.constexpr = tl.cdiv(C, CLASSES)
    groups: tl.constexpr = class_groups * tl.cdiv(D, CHANNELS)
    row, group = tl.program_id(0) // groups, tl.program_id(0) % groups
    program = row // images
    c = group % class_groups * CLASSES + tl.arange(0, CLASSES)[None, :]
    j = group // class_groups * CHANNELS + tl.arange(0, CHANNELS)[:, None]
    voxel = tl.arange(0, BLOCK)[:, None]
    summed = tl.zeros([CHANNELS, CLASSES], tl.float64)
    total = tl.zeros([1, CLASSES], tl.float64)
    tiles = tl.cdiv(N, BLOCK).to(tl.int32)
    before = (row - program * images) * tiles
    for tile in tl.range(
        program * tiles_of_program,
        tl.minimum((program + 1) * tiles_of_program, tiles),
        disable_licm=True,
        num_stages=1,
    ):
        image, first, inside = locate(before + tile, batch, N, BLOCK)
        w = start(weight, image, first, weight_batch_stride, weight_stride, WEIGHT_CHANNELS_LAST)
        w += offsets(voxel, c, weight_stride, WEIGHT_CHANNELS_LAST)
        w = tl.load(w, mask=inside & (c < C), other=0).to(tl.float32)
        x = start(z, image, first, batch_stride, stride, CHANNELS_LAST)
        x += offsets(tl.trans(voxel), j, stride, CHANNELS_LAST)
        x = tl.load(x, mask=tl.trans(inside) & (j < D), other=0).to(tl.float32)
        summed += tl.dot(x, w, input_precision=SIX_PARTS).to(tl.float64)
        total += tl.sum(w, axis=0, keep_dims=True).to(tl.float64)
    target = partials + tl.cast(row, tl.int64) * (C * D + C)
    tl.store(target + c * D + j, summed.to(tl.float32), mask=(c < C) & (j < D))
    if group < class_groups:
        tl.store(target + C * D + c, total.to(tl.float32), mask=c < C)


@triton.jit(do_not_specialize=[*_SIZES, "mixture_batch_stride", "mixture_stride", "share_batch_stride"])
def _mix(
    share,  # [B, C, D] float32, images may be the same
    bias,  # [B, D] float32 or None, strides as a row of the share
    weight,  # [B, C, N]
    mixture,  # [B, D, N]
    batch,
    N,
    share_batch_stride,
    weight_batch_stride,
    weight_stride,
    mixture_batch_stride,
    mixture_stride,
    SHARE_CLASS_STRIDE: tl.constexpr,
    SHARE_STRIDE: tl.constexpr,
    C: tl.constexpr,
    D: tl.constexpr,
    CLASSES: tl.constexpr,
    CHANNELS: tl.constexpr,
    BLOCK: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    WEIGHT_CHANNELS_LAST: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    N, mixture_batch_stride, mixture_stride = strides_of((N, mixture_batch_stride, mixture_stride), ALIGNED)
    weight_batch_stride, weight_stride = strides_of((weight_batch_stride, weight_stride), ALIGNED)
    # A mixture of 16 bits needs no more than three parts of the product.
    parts: tl.constexpr = SIX_PARTS if mixture.dtype.element_ty == tl.float32 else THREE_PARTS
    groups: tl.constexpr = tl.cdiv(D, CHANNELS)
    image, first, inside = locate(tl.program_id(0) // groups, batch, N, BLOCK)
    j = tl.program_id(0) % groups * CHANNELS + tl.arange(0, CHANNELS)[None, :]
    voxel = tl.arange(0, BLOCK)[:, None]
    weight = start(weight, image, first, weight_batch_stride, weight_stride, WEIGHT_CHANNELS_LAST)
    share += image * share_batch_stride
    total = tl.zeros([BLOCK, CHANNELS], tl.float32)
    for first_class in tl.range(0, C, CLASSES, disable_licm=True, num_stages=1):
        c = first_class + tl.arange(0, CLASSES)
        at = weight + offsets(voxel, c[None, :], weight_stride, WEIGHT_CHANNELS_LAST)
        w = tl.load(at, mask=inside & (c[None, :] < C), other=0).to(tl.float32)
        at = share + c[:, None] * SHARE_CLASS_STRIDE + j * SHARE_STRIDE
        of_class = tl.load(at, mask=(c[:, None] < C) & (j < D), other=0)
        total = tl.dot(w, of_class, total, input_precision=parts)
    if bias is not None:
        total += tl.load(bias + image * share_batch_stride + j * SHARE_STRIDE, mask=j < D, other=0)
    target = start(mixture, image, first, mixture_batch_stride, mixture_stride, CHANNELS_LAST)
    target += offsets(voxel, j, mixture_stride, CHANNELS_LAST)
    tl.store(target, total.to(mixture.dtype.element_ty), mask=inside & (j < D))


def _tiles(channels: int, classes: int) -> tuple[ClassProductTiles, dict[str, int]]:
    tiles = class_product_tiles(channels, classes)
    return tiles, {"C": classes, "D": channels, "CLASSES": tiles.classes, "CHANNELS": tiles.channels}


def sum_by_class(
    z: Voxels,  # [B, d, N]
    weight: Voxels,  # [B, C, N]
) -> Tensor:  # [programs, B, C * d + C] float32
    """Partial sums of every image: the products [C, d], and the weights [C]; see `add_partials`."""
    (batch, d, N), C = z.data.shape, weight.data.shape[1]
    tiles, sizes = _tiles(d, C)
    images, programs = max(batch, 1), max(triton.cdiv(N, tiles.sum_block * tiles.tiles), 1)
    groups = triton.cdiv(C, tiles.classes) * triton.cdiv(d, tiles.channels)
    partials = torch.empty(programs, images, C * d + C, dtype=torch.float32, device=z.data.device)
    launch(
        _sum, (programs * images * groups,), z.data, num_warps=4,
        z=z.data, weight=weight.data, partials=partials, batch=batch, images=images, N=N,
        batch_stride=z.batch_stride, stride=z.stride,
        weight_batch_stride=weight.batch_stride, weight_stride=weight.stride,
        tiles_of_program=tiles.tiles, **sizes, BLOCK=tiles.sum_block,
        CHANNELS_LAST=z.channels_last, WEIGHT_CHANNELS_LAST=weight.channels_last,
        ALIGNED=is_aligned(N, z, weight),
    )  # fmt: skip
    return partials


def mix_by_class(
    weight: Voxels,  # [B, C, N]
    share: Tensor,  # [B, C, d] float32
    mixture: Voxels,  # [B, d, N], written
    bias: Tensor | None = None,  # [B, d] float32, of the share's strides
) -> None:
    (batch, d, N), C = mixture.data.shape, weight.data.shape[1]
    tiles, sizes = _tiles(d, C)
    groups = triton.cdiv(d, tiles.channels)
    launch(
        _mix, (mixture.count_tiles(tiles.mix_block) * groups,), share, num_warps=4,
        share=share, bias=bias, weight=weight.data, mixture=mixture.data, batch=batch, N=N,
        share_batch_stride=share.stride(0), SHARE_CLASS_STRIDE=share.stride(1), SHARE_STRIDE=share.stride(2),
        weight_batch_stride=weight.batch_stride, weight_stride=weight.stride,
        mixture_batch_stride=mixture.batch_stride, mixture_stride=mixture.stride,
        **sizes, BLOCK=tiles.mix_block,
        CHANNELS_LAST=mixture.channels_last, WEIGHT_CHANNELS_LAST=weight.channels_last,
        ALIGNED=is_aligned(N, mixture, weight),
    )  # fmt: skip


def sums_of_images(
    partials: Tensor,  # [programs, B, columns], see `sum_by_class`
) -> Tensor:  # [B, columns] float64
    return add_partials(partials.flatten(1)).view(partials.shape[1:])


def sums_of_all(
    partials: Tensor,  # [programs, B, columns]
) -> Tensor:  # [columns] float64
    return add_partials(partials.flatten(0, 1))
