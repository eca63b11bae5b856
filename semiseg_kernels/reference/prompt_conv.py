"""Reference of the prompt convolution: of features and prompt, concatenated."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .common import convolve
from .prompt_mix import prompt_mix


def prompt_conv(
    features: Tensor,  # [B, F, *S]
    logits: Tensor,  # [B, C, *S]
    text: Tensor,  # [C, E]
    weight: Tensor,  # [O, F + E, *k]
    bias: Tensor | None = None,  # [O]
    *,
    padding: int | Sequence[int] | str = 0,
) -> Tensor:  # [B, O, *S']
    prompt = prompt_mix(logits, text)
    joined = torch.cat([features, prompt.to(features.dtype)], dim=1)
    return convolve(joined, weight, bias, padding)
