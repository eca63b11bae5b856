"""Launch of the momentum update of the prototypes."""

import torch
from torch import Tensor

from semiseg_kernels.native.extension import launch


def forward(
    backend: str,
    prototypes: Tensor,  # [C, K, d], updated in place
    cluster_sum: Tensor,  # [C, K, d]
    cluster_count: Tensor,  # [C, K]
    momentum: float,
) -> None:
    updated = prototypes.to(torch.float32).contiguous()
    sums = cluster_sum.to(torch.float32).contiguous()
    counts = cluster_count.to(torch.float64).contiguous()
    launch(
        backend,
        "momentum_update_forward",
        prototypes.device,
        prototypes=updated.data_ptr(),
        cluster_sum=sums.data_ptr(),
        cluster_count=counts.data_ptr(),
        clusters=counts.numel(),
        d=prototypes.shape[-1],
        momentum=momentum,
    )
    if updated is not prototypes:
        prototypes.copy_(updated)
