"""Reference of the linear classifier: a matrix product with the channels of every image."""

from torch import Tensor

from .common import bmm, flatten


def linear_classifier(
    x: Tensor,  # [B, d, *S]
    weight: Tensor,  # [C, d]
    bias: Tensor,  # [C]
    channel_scale: Tensor | None = None,  # [B, d]
) -> Tensor:  # [B, C, *S]
    voxels = flatten(x)
    scaled = weight.to(voxels.dtype).expand(x.shape[0], -1, -1)
    if channel_scale is not None:
        scaled = scaled * channel_scale.to(voxels.dtype).unsqueeze(1)
    logits = bmm(scaled, voxels) + bias.to(voxels.dtype).view(-1, 1)
    return logits.view(*logits.shape[:2], *x.shape[2:])
