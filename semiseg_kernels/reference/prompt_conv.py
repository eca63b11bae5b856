"""Reference of the prompt convolution: of features and prompt, concatenated."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import conv1d, conv2d, conv3d

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


def convolve(
    x: Tensor,  # [B, I, *S]
    weight: Tensor,  # [O, I, *k]
    bias: Tensor | None,  # [O]
    padding: int | Sequence[int] | str,
) -> Tensor:  # [B, O, *S']
    """PyTorch's convolution with as many axes as x has, in the dtype of x."""
    convolution = (conv1d, conv2d, conv3d)[x.dim() - 3]
    return convolution(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype), padding=padding)
