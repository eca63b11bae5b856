"""Dynamic labelling: the better of two branches has more say in the pseudo-label both learn from."""

import torch
from torch import Tensor

from semiseg_kernels import dice_ce


def branch_weights(
    loss_a: Tensor,  # scalar, Dice loss on labelled images
    loss_b: Tensor,  # scalar
) -> tuple[Tensor, Tensor]:
    """w₁ and w₂ of VCLIPSeg eqs. 7 and 8: softmax of 1 - sigmoid(loss), without gradient, as tensors."""
    losses = torch.stack([loss_a.detach(), loss_b.detach()])
    weight_a, weight_b = torch.softmax(1 - torch.sigmoid(losses), dim=0)
    return weight_a, weight_b


@torch.no_grad()
def dynamic_pseudo_label(
    logits_a: Tensor,  # [B, C, *S]
    logits_b: Tensor,  # [B, C, *S]
    weight_a: Tensor,  # scalar
    weight_b: Tensor,  # scalar
) -> Tensor:  # [B, C, *S] float32
    """P = w₁ softmax(a) + w₂ softmax(b), without gradient (VCLIPSeg eq. 9)."""
    probability = logits_a.float().softmax(1).mul_(weight_a)
    return probability.addcmul_(logits_b.float().softmax(1), weight_b)


def pseudo_label_loss(
    logits_a: Tensor,  # [B, C, *S]
    logits_b: Tensor,  # [B, C, *S]
    pseudo_label: Tensor,  # [B, C, *S] probabilities, or [B, *S] integer
    *,
    squared: bool = True,  # Dice's denominator, see `dice_ce`
    include_background: bool = True,  # in Dice
) -> Tensor:
    """Dice loss and cross-entropy of both branches against the pseudo-label, summed (VCLIPSeg eq. 10)."""
    losses = [
        dice_ce(logits, pseudo_label, squared=squared, include_background=include_background)
        for logits in (logits_a, logits_b)
    ]
    return torch.cat([*(loss.ce for loss in losses), *(loss.dice for loss in losses)]).sum()
