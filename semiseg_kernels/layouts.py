"""How tensors lie in memory, and in which of these layouts kernels read and write them."""

import torch
from torch import Tensor


def _has_kernel_layout(x: Tensor) -> bool:  # x [B, channels, voxels]
    return x.stride(2) == 1 or x.stride(1) == 1 or x.shape[1] <= 1 or x.shape[2] <= 1


def readable(x: Tensor) -> Tensor:
    """`x` [B, channels, *S] as [B, channels, voxels], copied where neither channels nor voxels lie adjacent."""
    flat = x.flatten(2)
    return flat if _has_kernel_layout(flat) else flat.contiguous()


def is_channels_last(x: Tensor) -> bool:
    """Whether `x` [B, channels, *S] is channels-last; one channel, or one voxel, may be contiguous as well."""
    return x.movedim(1, -1).is_contiguous()


def is_dense(x: Tensor) -> bool:
    """Whether `x` [B, channels, *S] is contiguous or channels-last."""
    return x.is_contiguous() or is_channels_last(x)


def dense(x: Tensor) -> Tensor:
    """`x` [B, channels, *S], copied where it is neither contiguous nor channels-last."""
    return x if is_dense(x) else x.contiguous()


def laid_out_as(x: Tensor, values: Tensor) -> Tensor:
    """`values` in the dtype and memory format of `x`, which is dense; copied where they have others."""
    if values.dtype == x.dtype and values.stride() == x.stride():
        return values
    return torch.empty_like(x).copy_(values)


def empty_gradient(x: Tensor) -> tuple[Tensor, Tensor]:
    """An uninitialised gradient of `x` [B, channels, *S] in its memory format, and what the kernel writes.

    The second shares the first's memory, unless `x` lies in neither memory format.
    """
    gradient = torch.empty_like(x)
    flat = readable(gradient)
    return gradient, flat


def finish_gradient(gradient: Tensor, written: Tensor) -> Tensor:
    if written.data_ptr() != gradient.data_ptr():
        gradient.copy_(written.view(gradient.shape))
    return gradient


def float_prototypes(prototypes: Tensor) -> Tensor:
    return prototypes.detach().to(torch.float32).contiguous()


def volume_sides(
    label: Tensor,  # [B, *S], *S 1 to 3 axes
) -> dict[str, int]:
    """Z, Y and X in voxels, 1 along the axes that the images lack."""
    sides = label.shape[1:]
    return dict(zip("ZYX", (*[1] * (3 - len(sides)), *sides), strict=True))
