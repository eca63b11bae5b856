"""Reference of prompt mixing: a text embedding for every voxel."""

from torch import Tensor

from .common import bmm, flatten


def prompt_mix(
    logits: Tensor,  # [B, C, *S]
    text: Tensor,  # [C, E]
) -> Tensor:  # [B, E, *S]
    share = flatten(logits).softmax(dim=1)
    prompt = bmm(text.to(share.dtype).T.expand(share.shape[0], -1, -1), share)
    return prompt.view(*prompt.shape[:2], *logits.shape[2:]).to(logits.dtype)
