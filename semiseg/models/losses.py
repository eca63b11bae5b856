"""What methods share about losses: weights per region and the ramp-up of an unsupervised term."""

import math
from typing import Protocol

from torch import Tensor

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


def sigmoid_ramp_up(
    iteration: float,
    length: float,  # iterations until the weight is 1; 0 for no ramp
) -> float:
    """λ(t) = exp(-5 (1 - min(t / T, 1))²), from 0.0067 at t = 0 to 1 from t = T on.

    Source: S. Laine and T. Aila, Temporal ensembling, ICLR 2017 (λ of MPER eq. 6, λ_u of VCLIPSeg eq. 11).
    """
    progress = min(iteration / length, 1.0) if length > 0 else 1.0
    return math.exp(RAMP_UP_EXPONENT * (1.0 - progress) ** 2)
