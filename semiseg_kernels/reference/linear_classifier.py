"""Reference of the linear classifier: a matrix product with the channels of every image."""

import torch
from torch import Tensor

from .common import accumulation_dtype


def linear_classifier(
    x: Tensor,  # [B, d, *S]
    weight: Tensor,  # [C, d]
    bias: Tensor,  # [C]
    channel_scale: Tensor | None = None,  # [B, d]
) -> Tensor:  # [B, C, *S]
    scaled = weight.expand(x.shape[0], -1, -1)
    if channel_scale is not None:
        scaled = weight * channel_scale.to(weight.dtype).unsqueeze(1)
    logits = torch.baddbmm(bias.to(x.dtype).view(1, -1, 1), scaled.to(x.dtype), x.flatten(2))
    return logits.view(*logits.shape[:2], *x.shape[2:]).to(accumulation_dtype(x))
