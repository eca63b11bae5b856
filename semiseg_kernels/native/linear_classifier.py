"""Launches of the linear classifier of every voxel."""

import torch
from torch import Tensor

from semiseg_kernels.layouts import empty_gradient, finish_gradient, readable
from semiseg_kernels.native.extension import launch, voxels


def forward(
    backend: str,
    x: Tensor,  # [B, d, *S]
    matrix: Tensor,  # [B, C, d + 1] float32
) -> Tensor:  # [B, C, *S] float32
    C = matrix.shape[1]
    logits = x.new_empty((x.shape[0], C, *x.shape[2:]), dtype=torch.float32)
    read, weights = readable(x), matrix.contiguous()
    launch(
        backend,
        "linear_classifier_forward",
        x.device,
        x=voxels(read),
        matrix=weights.data_ptr(),
        C=C,
        logits=voxels(logits.flatten(2)),
    )
    return logits


def backward(
    backend: str,
    grad_logits: Tensor,  # [B, C, *S]
    x: Tensor,  # [B, d, *S]
    matrix: Tensor,  # [B, C, d + 1] float32
) -> tuple[Tensor, Tensor]:  # [B, d, *S], [B, C, d + 1] float32
    gradient, written = empty_gradient(x)
    grad_matrix = torch.empty_like(matrix, memory_format=torch.contiguous_format)
    read, weights, upstream = readable(x), matrix.contiguous(), readable(grad_logits)
    launch(
        backend,
        "linear_classifier_backward",
        x.device,
        x=voxels(read),
        matrix=weights.data_ptr(),
        C=matrix.shape[1],
        grad_logits=voxels(upstream),
        grad_x=voxels(written),
        grad_matrix=grad_matrix.data_ptr(),
    )
    return finish_gradient(gradient, written), grad_matrix
