"""Reference of the linear classifier: the same linear map at every voxel."""

from torch import Tensor
from torch.nn import functional

from .common import accumulation_dtype


def linear_classifier(
    x: Tensor,  # [B, d, *S]
    weight: Tensor,  # [C, d]
    bias: Tensor,  # [C]
    channel_scale: Tensor | None = None,  # [B, d]
) -> Tensor:  # [B, C, *S]
    if channel_scale is not None:
        x = x * channel_scale.view(*channel_scale.shape, *[1] * (x.dim() - 2)).to(x.dtype)
    logits = functional.linear(x.movedim(1, -1), weight.to(x.dtype), bias.to(x.dtype)).movedim(-1, 1)
    return logits.to(accumulation_dtype(logits))
