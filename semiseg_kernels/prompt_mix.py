"""Prompt mixing: the text embedding of every voxel, by the softmax of its class logits."""

from typing import Any

import torch
from torch import Tensor

from . import backends, checks, reference
from .differentiation import once_differentiable


def prompt_mix(
    logits: Tensor,  # [B, C, *S]
    text: Tensor,  # [C, E]
) -> Tensor:  # [B, E, *S]
    """Mix the classes' text embeddings at every voxel by the softmax of its logits (VCLIPSeg eqs. 1 and 2).

        prompt[b, e, s] = sum_c softmax_c(logits[b, c, s]) * text[c, e]

    logits: float32, bfloat16 or float16 (float64 runs on the reference). Contiguous and channels-last are
        read in place, other strides are copied first.
    text: float32, bfloat16, float16 or the logits' dtype.

    The prompt has the logits' dtype; softmax and mix are computed in float32, also under autocast.
    Differentiable in both. NaN in a voxel gives NaN in its prompt alone. Raises ValueError on wrong shapes or
    dtypes.
    """
    checks.check_voxels("logits", logits)
    checks.check_text(text, logits, logits.dtype)
    backend = backends.select("prompt_mix", logits, text.shape[0], 1, text.shape[1])
    if backend == "reference":
        return reference.prompt_mix(logits, text)
    return _PromptMix.apply(logits, text, backend)


class _PromptMix(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, text: Tensor, backend: str) -> Tensor:
        ctx.save_for_backward(logits, text)
        ctx.backend = backend
        return torch.ops.semiseg_kernels.prompt_mix_forward(logits, text, backend)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_prompt: Tensor) -> tuple[Tensor | None, ...]:
        logits, text = ctx.saved_tensors
        grad_logits, grad_text = torch.ops.semiseg_kernels.prompt_mix_backward(
            grad_prompt, logits, text, ctx.backend
        )
        return grad_logits, grad_text.to(text.dtype), None


def _fake_forward(logits: Tensor, text: Tensor, backend: str) -> Tensor:
    return logits.new_empty((logits.shape[0], text.shape[1], *logits.shape[2:]))


def _fake_backward(grad_prompt: Tensor, logits: Tensor, text: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    return torch.empty_like(logits), text.new_empty(text.shape, dtype=torch.float32)


backends.register("prompt_mix_forward(Tensor logits, Tensor text, str backend) -> Tensor", _fake_forward)
backends.register(
    "prompt_mix_backward(Tensor grad_prompt, Tensor logits, Tensor text, str backend) -> (Tensor, Tensor)",
    _fake_backward,
)
