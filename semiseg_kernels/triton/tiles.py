"""Tiles of voxels: where they lie, and the reading of what belongs to a voxel.

A tile is [BLOCK, columns]; what a voxel has once is [BLOCK, 1].
"""

import triton
import triton.language as tl


@triton.jit
def stride_of(stride, ALIGNED: tl.constexpr):
    """`stride` as int64; where it is a multiple of 16, in a form that the compiler knows to be one."""
    wide = tl.cast(stride, tl.int64)
    if ALIGNED:
        wide = wide // 16 * 16
    return wide


@triton.jit
def strides_of(sizes, ALIGNED: tl.constexpr):
    """`stride_of` each of a tuple of sizes and strides."""
    return [stride_of(size, ALIGNED) for size in sizes]


@triton.jit
def count_tiles(batch, N, BLOCK: tl.constexpr):
    """The tiles of all images."""
    return batch * tl.cdiv(N, BLOCK).to(tl.int32)


@triton.jit
def locate(tile, batch, N, BLOCK: tl.constexpr):
    """The image of a tile, its first voxel, and which of its voxels exist: scalars and [BLOCK, 1]."""
    # Without voxels one tile still runs, and finds none.
    per_image = tl.maximum(tl.cdiv(N, BLOCK), 1).to(tl.int32)
    image = tile // per_image
    first = tl.cast(tile - image * per_image, tl.int64) * BLOCK
    image = tl.cast(image, tl.int64)
    inside = first + tl.arange(0, BLOCK)[:, None] < tl.where(image < batch, N, 0)
    return image, first, inside


@triton.jit
def start(x, image, first, batch_stride, stride, CHANNELS_LAST: tl.constexpr):
    """The address of a tile's first voxel."""
    return x + image * batch_stride + (first * stride if CHANNELS_LAST else first)


@triton.jit
def offsets(voxels, channels, stride, CHANNELS_LAST: tl.constexpr):
    """Offsets of voxels [BLOCK, 1] and channels [1, n], or both transposed, from a tile's first voxel."""
    if CHANNELS_LAST:
        return voxels * stride + channels
    else:
        return voxels + channels * stride


@triton.jit
def class_offsets(image, first, N, C: tl.constexpr, CLASSES: tl.constexpr, BLOCK: tl.constexpr):
    """Offsets [BLOCK, CLASSES] of a tile in a contiguous map [B, C, N]."""
    c = tl.arange(0, CLASSES)[None, :]
    return (image * C + c) * N + first + tl.arange(0, BLOCK)[:, None]


@triton.jit
def read_labels(labels, voxel, inside, C: tl.constexpr):
    """Labels [BLOCK, 1] as int32, -1 where a voxel is left out; without labels 0 and -1."""
    if labels is None:
        return tl.where(inside, 0, -1)
    else:
        value = tl.load(labels + voxel, mask=inside, other=0)
        # A uint64 beyond the range of int64 turns negative here, and is out of range either way.
        value = value.to(tl.int32 if value.dtype.primitive_bitwidth < 32 else tl.int64)
        return tl.where(inside & (value >= 0) & (value < C), value, -1).to(tl.int32)


@triton.jit
def read_weights(weight, voxel, kept):
    """Weights [BLOCK, 1] as float32, 0 where a voxel is not kept."""
    if weight is None:
        return kept.to(tl.float32)
    else:
        return tl.load(weight + voxel, mask=kept, other=0).to(tl.float32)
