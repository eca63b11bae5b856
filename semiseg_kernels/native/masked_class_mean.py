"""Launches of the masked class mean."""

import torch
from torch import Tensor

from semiseg_kernels.layouts import empty_gradient, finish_gradient, readable
from semiseg_kernels.native.extension import launch, voxels


def forward(
    backend: str,
    z: Tensor,  # [B, d, *S]
    weight: Tensor,  # [B, C, *S]
) -> tuple[Tensor, Tensor]:  # mean [C, d] float32, sums of the weights [C] float64
    C, d = weight.shape[1], z.shape[1]
    mean = torch.empty(C, d, dtype=torch.float32, device=z.device)
    total = torch.empty(C, dtype=torch.float64, device=z.device)
    read, read_weight = readable(z), readable(weight)
    launch(
        backend,
        "masked_class_mean_forward",
        z.device,
        z=voxels(read),
        weight=voxels(read_weight),
        total=total.data_ptr(),
        mean=mean.data_ptr(),
    )
    return mean, total


def backward(
    backend: str,
    grad_mean: Tensor,  # [C, d]
    total: Tensor,  # [C]
    z: Tensor,  # [B, d, *S]
    weight: Tensor,  # [B, C, *S]
) -> Tensor:  # [B, d, *S]
    gradient, written = empty_gradient(z)
    read_weight, upstream = readable(weight), grad_mean.to(torch.float32).contiguous()
    launch(
        backend,
        "masked_class_mean_backward",
        z.device,
        weight=voxels(read_weight),
        total=total.data_ptr(),
        grad_mean=upstream.data_ptr(),
        grad_z=voxels(written),
    )
    return finish_gradient(gradient, written)
