"""Sums over the processes of a group, as if one process held the voxels of all."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, distributed

from .differentiation import once_differentiable

_group: distributed.ProcessGroup | None = None


@contextmanager
def use_process_group(group: distributed.ProcessGroup | None) -> Iterator[None]:
    """Make the losses, class means and cluster sums of every operation inside those of all processes' voxels together.

    They are the same on every process of the group; what an operation returns per voxel stays the process's own. All
    processes must make the same calls in the same order. A gradient is that of the sum of what the processes call
    backward on, as with torch.distributed.nn.functional.all_reduce: where that is the same loss of the joined batch on
    each, the mean over the processes of a parameter's gradients is that loss's gradient. None switches it off. It holds
    for all threads of the process.
    """
    global _group
    previous, _group = _group, group
    try:
        yield
    finally:
        _group = previous


def current_group() -> distributed.ProcessGroup | None:
    """The group of the innermost `use_process_group`."""
    return _group


def sum_over_processes(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The sums of real tensors over the processes of the group in use, in one communication; differentiable.

    Every process must give the same number of tensors of the same shapes and dtypes; of bool tensors the sum is "or".
    Without `use_process_group` they come back as they are.
    """
    if _group is None:
        return tensors
    return _SumOverProcesses.apply(_group, *tensors)


def all_reduce(group: distributed.ProcessGroup, *tensors: Tensor) -> tuple[Tensor, ...]:
    """The sums of tensors over the processes of a group, added in float64; without gradient."""
    if not tensors:
        return ()
    flat = torch.cat([tensor.detach().flatten().double() for tensor in tensors])
    distributed.all_reduce(flat, group=group)
    parts = flat.split([tensor.numel() for tensor in tensors])
    return tuple(part.view(x.shape).to(x.dtype, copy=True) for part, x in zip(parts, tensors, strict=True))


def mean(
    summed: Tensor,  # [*S]
    count: Tensor,  # [*S]
) -> Tensor:  # [*S]
    """summed / count in float32, 0 where the count is 0."""
    return torch.where(count != 0, summed / torch.where(count != 0, count, 1), 0).float()


class _SumOverProcesses(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, group: distributed.ProcessGroup, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.group = group
        summed = all_reduce(group, *tensors)
        ctx.mark_non_differentiable(*(tensor for tensor in summed if not tensor.is_floating_point()))
        return summed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return None, *all_reduce(ctx.group, *gradients)
