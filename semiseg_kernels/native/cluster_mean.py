"""Launch of the cluster mean."""

import torch
from torch import Tensor

from semiseg_kernels.layouts import float_prototypes, readable
from semiseg_kernels.native.extension import check_highest, launch, voxel_map, voxels


def forward(
    backend: str,
    z: Tensor,  # [B, d, *S]
    prototypes: Tensor,  # [C, K, d]
    labels: Tensor,  # [B, *S]
    weight: Tensor | None,  # [B, *S]
    unit_length: bool,
    require_agreement: bool,
) -> tuple[Tensor, Tensor]:  # cluster_sum [C, K, d] float32, cluster_count [C, K] float64
    C, K, d = prototypes.shape
    cluster_sum = torch.empty(C, K, d, dtype=torch.float32, device=z.device)
    cluster_count = torch.empty(C, K, dtype=torch.float64, device=z.device)
    read, points = readable(z), float_prototypes(prototypes)
    label_map, weight_map = voxel_map(labels), voxel_map(weight)
    highest = launch(
        backend,
        "cluster_mean_forward",
        z.device,
        z=voxels(read),
        prototypes=points.data_ptr(),
        C=C,
        K=K,
        labels=voxels(label_map),
        weight=voxels(weight_map),
        unit_length=unit_length,
        require_agreement=require_agreement,
        cluster_sum=cluster_sum.data_ptr(),
        cluster_count=cluster_count.data_ptr(),
    )
    check_highest(highest, labels=C)
    return cluster_sum, cluster_count
