"""What methods share about losses: weights per region, a ramp-up, branches that teach each other."""

import math
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from semiseg.models.predicted_class import predicted_class
from semiseg_kernels import dice_ce
from semiseg_kernels.process_group import current_group

RAMP_UP_EXPONENT = -5.0


class RegionLosses(Protocol):
    """Cross-entropy and Dice loss per region, as `dice_ce` and `prototype_head` return them."""

    @property
    def ce(self) -> Tensor: ...  # [R]

    @property
    def dice(self) -> Tensor: ...  # [R]


def region_weighted_loss(
    losses: RegionLosses,
    region_weights: Tensor,  # [R], on the device of the losses
) -> Tensor:
    """Σ_r w_r (CE_r + Dice_r) / 2, a scalar (MPER eq. 4, halved, with one weight for each pasted region)."""
    if region_weights.shape != losses.ce.shape:
        raise ValueError(
            f"region_weights has shape {tuple(region_weights.shape)}, accepted is one weight per region, "
            f"{tuple(losses.ce.shape)}"
        )
    return (region_weights * (losses.ce + losses.dice)).sum() / 2


def regions_by_image(
    regions: Tensor,  # [B, *S] uint8, in 0..R-1
    region_weights: Tensor,  # [R]
) -> tuple[Tensor, Tensor]:  # [B, *S] uint8, [B R], or of n processes [n B R]
    """Regions numbered image by image, and their weights divided among the images of the batch.

    `region_weighted_loss` over them is the mean of each image's own loss. Within `use_process_group` the batch is that
    of all processes, each with as many images.
    """
    group = current_group()
    rank, processes = (0, 1) if group is None else (group.rank(), group.size())
    images, count = len(regions), len(region_weights)
    image = torch.arange(rank * images, (rank + 1) * images, device=regions.device)
    first = (count * image).to(regions.dtype).view(-1, *[1] * (regions.dim() - 1))
    return regions + first, region_weights.repeat(processes * images) / (processes * images)


def sigmoid_ramp_up(
    iteration: int,
    length: int,  # iterations until the weight is 1; 0 for no ramp
    step: int = 1,  # iterations between its moves
) -> float:
    """λ(t) = exp(-5 (1 - min(t / T, 1))²), from 0.0067 at t = 0 to 1 from t = T on, t the last multiple of the step.

    Source: S. Laine and T. Aila, Temporal ensembling, ICLR 2017 (λ of MPER eq. 6, λ_u of VCLIPSeg eq. 11).
    """
    progress = min(iteration // step * step / length, 1.0) if length > 0 else 1.0
    return math.exp(RAMP_UP_EXPONENT * (1.0 - progress) ** 2)


def cross_pseudo_supervision(
    logits_a: Tensor,  # [B, C, *S]
    logits_b: Tensor,  # [B, C, *S]
) -> Tensor:
    """CE(a, arg max b) + CE(b, arg max a): each branch learns the other's prediction, a scalar.

    Source: X. Chen et al., Semi-supervised semantic segmentation with cross pseudo supervision, CVPR 2021.
    """
    of_a = dice_ce(logits_a, predicted_class(logits_b).to(torch.uint8)).ce
    of_b = dice_ce(logits_b, predicted_class(logits_a).to(torch.uint8)).ce
    return (of_a + of_b).sum()


def mutual_consistency(
    logits_a: Tensor,  # [B, C, *S]
    logits_b: Tensor,  # [B, C, *S]
    temperature: float = 0.1,  # sharpens the target: softmax(logits / temperature)
) -> Tensor:
    """Mean squared distance of each branch's probabilities from the other's sharpened ones, summed, a scalar.

    Source: Y. Wu et al., Semi-supervised left atrium segmentation with mutual consistency training, MICCAI
    2021.
    """

    def distance(logits: Tensor, teacher: Tensor) -> Tensor:
        target = (teacher.detach().float() / temperature).softmax(1)
        return functional.mse_loss(logits.float().softmax(1), target)

    return distance(logits_a, logits_b) + distance(logits_b, logits_a)
