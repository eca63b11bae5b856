"""What the launches share: tensors and numbers as the kernels see them."""

import ctypes
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from semiseg_kernels.layouts import empty_gradient, readable


class Voxels(NamedTuple):
    """A tensor [B, channels, voxels] of which channels or voxels lie adjacent."""

    data: Tensor
    batch_stride: int
    stride: int  # of the voxels where channels lie adjacent, else of the channels
    channels_last: bool

    def count_tiles(self, block: int) -> int:
        batch, _, voxels = self.data.shape
        return batch * triton.cdiv(voxels, block)

    def count_programs(self, block: int, tiles: int) -> int:
        """Programs of so many tiles each that sum over the voxels; without voxels one still runs, and finds none."""
        return max(triton.cdiv(self.count_tiles(block), tiles), 1)


def as_voxels(
    x: Tensor,  # [B, channels, *S]
) -> Voxels:
    """`x` read in place where its strides allow, else copied."""
    flat = readable(x)
    # A single channel is both; one rule for it keeps an embedding and its gradient alike.
    channels_last = flat.shape[1] == 1 or (flat.shape[2] > 1 and flat.stride(2) != 1)
    return Voxels(flat, flat.stride(0), flat.stride(2 if channels_last else 1), channels_last)


def with_gradient(
    x: Tensor,  # [B, channels, *S]
) -> tuple[Voxels, Tensor, Voxels]:  # x, its uninitialised gradient, and what the kernel writes of it
    gradient, written = empty_gradient(x)
    read, target = as_voxels(x), as_voxels(written)
    if read.channels_last != target.channels_last:  # x has gaps, as an expanded tensor or a crop, and its gradient none
        read = as_voxels(torch.empty_like(gradient).copy_(x))
    return read, gradient, target


def is_aligned(voxels: int, *tensors: Voxels) -> bool:
    """Whether every row starts at a multiple of 16 elements, so that its loads can be wide.

    This and the layout are all that a kernel is compiled for of the tensors' sizes.
    """
    return all(n % 16 == 0 for x in tensors for n in (voxels, x.batch_stride, x.stride))


def in_two(value: float) -> tuple[float, float]:
    """A number as the sum of two: a kernel receives numbers as float32, and twice its digits are nearly float64's."""
    high = ctypes.c_float(value).value
    return high, value - high


def launch(kernel: Any, grid: tuple[int, ...], like: Tensor, num_warps: int, **arguments: Any) -> None:
    """Run a kernel on the device of `like`, and on its current stream."""
    with torch.cuda.device_of(like):
        # Products and sums are joined whatever the version's default is: the multiply-adds bound some kernels.
        kernel[grid](**arguments, num_warps=num_warps, num_stages=2, enable_fp_fusion=True)
