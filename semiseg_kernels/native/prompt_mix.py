"""Launches of the prompt mixing."""

import torch
from torch import Tensor

from semiseg_kernels.layouts import empty_gradient, finish_gradient, float_prototypes, readable
from semiseg_kernels.native.extension import launch, voxels


def forward(
    backend: str,
    logits: Tensor,  # [B, C, *S]
    text: Tensor,  # [C, E]
) -> Tensor:  # [B, E, *S]
    E = text.shape[1]
    prompt = logits.new_empty((logits.shape[0], E, *logits.shape[2:]))
    read, vectors = readable(logits), float_prototypes(text)
    launch(
        backend,
        "prompt_mix_forward",
        logits.device,
        logits=voxels(read),
        text=vectors.data_ptr(),
        E=E,
        prompt=voxels(prompt.flatten(2)),
    )
    return prompt


def backward(
    backend: str,
    grad_prompt: Tensor,  # [B, E, *S]
    logits: Tensor,  # [B, C, *S]
    text: Tensor,  # [C, E]
) -> tuple[Tensor, Tensor]:  # [B, C, *S], [C, E] float32
    gradient, written = empty_gradient(logits)
    grad_text = torch.empty(text.shape, dtype=torch.float32, device=text.device)
    read, vectors, upstream = readable(logits), float_prototypes(text), readable(grad_prompt)
    launch(
        backend,
        "prompt_mix_backward",
        logits.device,
        logits=voxels(read),
        text=vectors.data_ptr(),
        E=text.shape[1],
        grad_prompt=voxels(upstream),
        grad_logits=voxels(written),
        grad_text=grad_text.data_ptr(),
    )
    return finish_gradient(gradient, written), grad_text
