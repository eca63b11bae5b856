"""Momentum update of the prototypes."""

import torch
from torch import Tensor

from . import backends, checks, reference


def momentum_update_(
    prototypes: Tensor,  # [C, K, d]
    cluster_sum: Tensor,  # [C, K, d]
    cluster_count: Tensor,  # [C, K]
    momentum: float,
) -> Tensor:  # prototypes
    """Move the prototypes towards their clusters' means, in place (MPER eq. 2).

        p <- momentum * p + (1 - momentum) * cluster_sum / cluster_count  where cluster_count != 0

    prototypes: floating point; cluster_sum: float32 or float64; cluster_count: float64, as `cluster_mean` and
    `prototype_head` return them. Empty clusters keep their prototype. Returns `prototypes`. No gradient.

    Call it after the backward pass of losses of these prototypes, which needs them as they were. Raises ValueError
    on wrong shapes or dtypes and a momentum outside 0..1.
    """
    checks.check_dtype("prototypes", prototypes, checks.FLOAT_DTYPES)
    checks.check_dtype("cluster_sum", cluster_sum, (torch.float32, torch.float64))
    checks.check_dtype("cluster_count", cluster_count, (torch.float64,))
    if prototypes.dim() != 3:
        raise ValueError(f"prototypes has shape {list(prototypes.shape)}, accepted is [C, K, d]")
    checks.check_shape("cluster_sum", cluster_sum, tuple(prototypes.shape))
    checks.check_shape("cluster_count", cluster_count, tuple(prototypes.shape[:2]))
    checks.check_device("cluster_sum", cluster_sum, prototypes)
    checks.check_device("cluster_count", cluster_count, prototypes)
    checks.check_written("prototypes", prototypes)
    checks.check_fraction("momentum", momentum)
    backend = backends.select("momentum_update", prototypes, *prototypes.shape)
    if backend == "reference":
        return reference.momentum_update_(prototypes, cluster_sum, cluster_count, momentum)
    with torch.no_grad():
        torch.ops.semiseg_kernels.momentum_update_forward(
            prototypes, cluster_sum, cluster_count, float(momentum), backend
        )
    # The raw operation has no key that does it: backward would not notice that a saved tensor has changed.
    torch.autograd.graph.increment_version(prototypes)
    return prototypes


def _fake_forward(
    prototypes: Tensor, cluster_sum: Tensor, cluster_count: Tensor, momentum: float, backend: str
) -> None:
    return None


backends.register(
    "momentum_update_forward(Tensor(a!) prototypes, Tensor cluster_sum, Tensor cluster_count, "
    "float momentum, str backend) -> ()",
    _fake_forward,
)
