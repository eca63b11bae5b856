"""Prompt convolution: of features and voxel-wise prompts, without ever forming the prompts."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import backends, checks, reference
from .differentiation import once_differentiable
from .reference.common import accumulation_dtype, bmm, convolve


def prompt_conv(
    features: Tensor,  # [B, F, *S]
    logits: Tensor,  # [B, C, *S]
    text: Tensor,  # [C, E]
    weight: Tensor,  # [O, F + E, *k]
    bias: Tensor | None = None,  # [O]
    *,
    padding: int | Sequence[int] | str = 0,
) -> Tensor:  # [B, O, *S']
    """Convolution of the features and the prompts `prompt_mix(logits, text)`, concatenated (VCLIPSeg eq. 3).

    The prompt is linear in the softmax, so its E channels fold into C:

        conv(cat(f, prompt), weight) = conv(f, weight[:, :F]) + conv(softmax(logits), folded),
        folded[o, c, k] = sum_e weight[o, F + e, k] * text[c, e]

    exactly, also at the borders, as a prompt padded with zeros is the mix of a softmax padded with zeros.

    features: float32, bfloat16, float16 or float64, contiguous or channels-last; logits, text, weight and
        bias: float32, bfloat16, float16 or the features' dtype.
    padding: as PyTorch's convolutions take it: a number, one for each axis of S, "same" or "valid".

    Both convolutions are PyTorch's, in the features' dtype or, under autocast, in autocast's; softmax and
    folding are always in float32 (float64 for float64 weights). There is no kernel: it runs on every device,
    and concatenates where the backend is "reference". Differentiable in all five tensors. Raises ValueError
    on wrong shapes, dtypes or padding.
    """
    checks.check_voxels("features", features)
    checks.check_maps("logits", logits, features, (*checks.KERNEL_DTYPES, features.dtype))
    checks.check_text(text, logits, features.dtype)
    checks.check_convolution(weight, bias, padding, features, features.shape[1] + text.shape[1])
    if backends.reference_is_requested():
        return reference.prompt_conv(features, logits, text, weight, bias, padding=padding)
    of_features, folded = _FoldedWeight.apply(weight.to(accumulation_dtype(weight)), text)
    softmax = logits.to(accumulation_dtype(logits)).softmax(dim=1).to(features.dtype)
    # Two convolutions: one would copy the features, and leave the vectors of its channels partly empty. The large one
    # last, as its backward then comes first, before the gradients of the other take memory.
    prompt = convolve(softmax, folded, None, padding)
    return convolve(features, of_features, bias, padding).add_(prompt)


class _FoldedWeight(torch.autograd.Function):
    """The features' part of the weight, and the prompt's part folded; their gradients meet in a single tensor."""

    @staticmethod
    def forward(
        ctx: Any,
        weight: Tensor,  # [O, F + E, *k]
        text: Tensor,  # [C, E]
    ) -> tuple[Tensor, Tensor]:  # [O, F, *k], [O, C, *k]
        ctx.save_for_backward(weight, text)
        of_features, of_prompt = _parts(weight, text)
        folded = bmm(text.to(weight.dtype).expand(weight.shape[0], -1, -1), of_prompt)
        return of_features, folded.view(*folded.shape[:2], *weight.shape[2:])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_of_features: Tensor, grad_folded: Tensor) -> tuple[Tensor, Tensor]:
        weight, text = ctx.saved_tensors
        grad_folded = grad_folded.flatten(2)
        grad_weight = weight.new_empty(weight.shape)
        of_features, of_prompt = _parts(grad_weight, text)
        of_features.copy_(grad_of_features)
        of_prompt.baddbmm_(text.to(weight.dtype).T.expand(weight.shape[0], -1, -1), grad_folded, beta=0)
        grad_text = bmm(grad_folded, _parts(weight, text)[1].mT).sum(dim=0)
        return grad_weight, grad_text.to(text.dtype)


def _parts(
    weight: Tensor,  # [O, F + E, *k]
    text: Tensor,  # [C, E]
) -> tuple[Tensor, Tensor]:  # [O, F, *k], [O, E, |k|]
    width = text.shape[1]
    return weight[:, :-width], weight[:, -width:].flatten(2)
