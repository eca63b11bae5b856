"""Reference of the momentum update of prototypes."""

import torch
from torch import Tensor


@torch.no_grad()
def momentum_update_(
    prototypes: Tensor,  # [C, K, d]
    cluster_sum: Tensor,  # [C, K, d]
    cluster_count: Tensor,  # [C, K]
    momentum: float,
) -> Tensor:  # prototypes
    count = cluster_count.double().unsqueeze(2)
    updated = momentum * prototypes.double() + (1 - momentum) * (cluster_sum.double() / count)
    return prototypes.copy_(torch.where(count != 0, updated, prototypes.double()))
