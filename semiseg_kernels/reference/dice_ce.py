"""Reference of Dice and cross-entropy per region."""

from typing import NamedTuple

import torch
from torch import Tensor

from ..process_group import current_group, sum_over_processes
from .common import class_labels, flatten, region_indices

DICE_SMOOTH = 1e-5


class DiceCE(NamedTuple):
    """Cross-entropy and Dice loss of every region."""

    ce: Tensor  # [R]
    dice: Tensor  # [R]


def dice_ce(
    logits: Tensor,  # [B, C, *S]
    target: Tensor,  # [B, *S] integer labels, or [B, C, *S] probabilities
    *,
    regions: Tensor | None = None,  # [B, *S]
    num_regions: int | None = None,
    temperature: float = 1.0,
    squared: bool = True,
    include_background: bool = True,
) -> DiceCE:
    log_probability = (flatten(logits) / temperature).log_softmax(dim=1)
    if target.is_floating_point():
        soft_target = target.detach().flatten(2).to(log_probability.dtype)
        keep = torch.ones_like(log_probability[:, 0], dtype=torch.bool)
    else:
        labels = class_labels(target, logits.shape[1], name="target")
        soft_target = one_hot(labels, logits.shape[1]).to(log_probability.dtype)
        keep = labels >= 0
    return region_losses(
        log_probability, soft_target, keep, regions, num_regions, squared, 0 if include_background else 1
    )


def one_hot(
    labels: Tensor,  # [B, N]
    num_classes: int,
) -> Tensor:  # [B, C, N] bool, all False where the label is negative
    return labels.unsqueeze(1) == torch.arange(num_classes, device=labels.device).unsqueeze(1)


def region_losses(
    log_probability: Tensor,  # [B, C, N]
    target: Tensor,  # [B, C, N]
    keep: Tensor,  # [B, N] bool
    regions: Tensor | None,  # [B, *S]
    num_regions: int | None,
    squared: bool,
    first_class: int,  # of those in Dice
) -> DiceCE:
    """Mean cross-entropy and Dice loss over the voxels of each region that are kept."""
    num_regions = count_regions(regions, num_regions)
    region = region_indices(regions, num_regions, like=keep)
    probability = log_probability.exp()
    voxel_ce = -(target * torch.where(target != 0, log_probability, 0)).sum(dim=1)  # [B, N]
    voxel_intersection = probability * target  # [B, C, N]
    # [B, C, N]
    voxel_cardinality = probability.square() + target.square() if squared else probability + target
    ce, dice = [], []
    for r in range(num_regions):
        inside = keep & (region == r)
        ce_sum, count, intersection, cardinality = sum_over_processes(
            torch.where(inside, voxel_ce, 0).sum(),
            inside.sum(),
            torch.where(inside.unsqueeze(1), voxel_intersection, 0).sum(dim=(0, 2)),
            torch.where(inside.unsqueeze(1), voxel_cardinality, 0).sum(dim=(0, 2)),
        )
        ce.append(ce_sum / count.clamp_min(1))
        scores = (2 * intersection + DICE_SMOOTH) / (cardinality + DICE_SMOOTH)
        dice.append(1 - scores[first_class:].mean())
    return DiceCE(torch.stack(ce), torch.stack(dice))


def count_regions(
    regions: Tensor | None,  # [B, *S]
    num_regions: int | None,
) -> int:
    """`num_regions` if given, else 1 + the largest region (reads the map; synchronises on a GPU).

    Raises ValueError where processes might read different numbers.
    """
    if num_regions is not None:
        return num_regions
    if regions is None:
        return 1
    if current_group() is not None:
        raise ValueError("num_regions is None, accepted within use_process_group is the number of regions")
    if regions.numel() == 0:
        return 1
    return int(regions.max()) + 1
