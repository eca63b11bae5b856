"""Launches of prototype InfoNCE."""

import torch
from torch import Tensor

from semiseg_kernels.layouts import empty_gradient, finish_gradient, float_prototypes, readable
from semiseg_kernels.native.extension import check_highest, launch, voxel_map, voxels


def forward(
    backend: str,
    z: Tensor,  # [B, d, *S]
    prototypes: Tensor,  # [C, K, d]
    labels: Tensor | None,  # [B, *S]
    weight: Tensor | None,  # [B, *S]
    temperature: float,
    normalize: bool,
    ignore_prototype: int,
) -> tuple[Tensor, Tensor]:  # loss float32, sum of the kept voxels' weights float64
    C, K, _ = prototypes.shape
    loss = torch.empty((), dtype=torch.float32, device=z.device)
    denominator = torch.empty((), dtype=torch.float64, device=z.device)
    read, points = readable(z), float_prototypes(prototypes)
    label_map, weight_map = voxel_map(labels), voxel_map(weight)
    highest = launch(
        backend,
        "prototype_info_nce_forward",
        z.device,
        z=voxels(read),
        prototypes=points.data_ptr(),
        C=C,
        K=K,
        labels=voxels(label_map),
        weight=voxels(weight_map),
        temperature=temperature,
        normalize=normalize,
        ignore_prototype=ignore_prototype,
        denominator=denominator.data_ptr(),
        loss=loss.data_ptr(),
    )
    check_highest(highest, labels=C)
    return loss, denominator


def backward(
    backend: str,
    grad_loss: Tensor,  # []
    denominator: Tensor,  # []
    z: Tensor,  # [B, d, *S]
    prototypes: Tensor,  # [C, K, d]
    labels: Tensor | None,  # [B, *S]
    weight: Tensor | None,  # [B, *S]
    temperature: float,
    normalize: bool,
    ignore_prototype: int,
) -> Tensor:  # [B, d, *S]
    C, K, _ = prototypes.shape
    gradient, written = empty_gradient(z)
    read, points = readable(z), float_prototypes(prototypes)
    label_map, weight_map = voxel_map(labels), voxel_map(weight)
    upstream = grad_loss.to(torch.float32)
    launch(
        backend,
        "prototype_info_nce_backward",
        z.device,
        z=voxels(read),
        prototypes=points.data_ptr(),
        C=C,
        K=K,
        labels=voxels(label_map),
        weight=voxels(weight_map),
        temperature=temperature,
        normalize=normalize,
        ignore_prototype=ignore_prototype,
        denominator=denominator.data_ptr(),
        grad_loss=upstream.data_ptr(),
        grad_z=voxels(written),
    )
    return finish_gradient(gradient, written)
