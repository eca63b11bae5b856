"""Launches of Dice and cross-entropy per region."""

import torch
from torch import Tensor

from semiseg_kernels.dice_ce import statistics_size
from semiseg_kernels.layouts import empty_gradient, finish_gradient, readable
from semiseg_kernels.native.extension import check_highest, launch, voxel_map, voxels


def _labels_or_soft(target: Tensor) -> tuple[Tensor | None, Tensor | None]:
    return (None, readable(target)) if target.is_floating_point() else (voxel_map(target), None)


def forward(
    backend: str,
    logits: Tensor,  # [B, C, *S]
    target: Tensor,  # [B, *S] labels or [B, C, *S] float
    regions: Tensor | None,  # [B, *S]
    num_regions: int,
    temperature: float,
    squared: bool,
    first_class: int,
) -> tuple[Tensor, Tensor, Tensor]:  # ce [R], dice [R], statistics
    C = logits.shape[1]
    ce = torch.empty(num_regions, dtype=torch.float32, device=logits.device)
    dice = torch.empty_like(ce)
    statistics = torch.empty(statistics_size(num_regions, C), dtype=torch.float64, device=logits.device)
    read, region_map = readable(logits), voxel_map(regions)
    labels, soft_target = _labels_or_soft(target)
    highest = launch(
        backend,
        "dice_ce_forward",
        logits.device,
        logits=voxels(read),
        labels=voxels(labels),
        soft_target=voxels(soft_target),
        regions=voxels(region_map),
        num_regions=num_regions,
        temperature=temperature,
        squared=squared,
        first_class=first_class,
        statistics=statistics.data_ptr(),
        ce=ce.data_ptr(),
        dice=dice.data_ptr(),
    )
    check_highest(highest, target=C, regions=num_regions)
    return ce, dice, statistics


def backward(
    backend: str,
    grad_ce: Tensor,  # [R]
    grad_dice: Tensor,  # [R]
    logits: Tensor,  # [B, C, *S]
    target: Tensor,  # [B, *S] labels or [B, C, *S] float
    regions: Tensor | None,  # [B, *S]
    statistics: Tensor,
    num_regions: int,
    temperature: float,
    squared: bool,
    first_class: int,
) -> Tensor:  # [B, C, *S]
    gradient, written = empty_gradient(logits)
    read, region_map = readable(logits), voxel_map(regions)
    labels, soft_target = _labels_or_soft(target)
    by_ce, by_dice = (grad.to(torch.float32).contiguous() for grad in (grad_ce, grad_dice))
    launch(
        backend,
        "dice_ce_backward",
        logits.device,
        logits=voxels(read),
        labels=voxels(labels),
        soft_target=voxels(soft_target),
        regions=voxels(region_map),
        num_regions=num_regions,
        temperature=temperature,
        squared=squared,
        first_class=first_class,
        statistics=statistics.data_ptr(),
        grad_ce=by_ce.data_ptr(),
        grad_dice=by_dice.data_ptr(),
        grad_logits=voxels(written),
    )
    return finish_gradient(gradient, written)
