"""Cluster mean: sums and counts of the voxels nearest to each prototype of their label's class."""

import torch
from torch import Tensor

from . import backends, checks, reference
from .process_group import sum_over_processes


def cluster_mean(
    z: Tensor,  # [B, d, *S]
    prototypes: Tensor,  # [C, K, d]
    labels: Tensor,  # [B, *S]
    *,
    weight: Tensor | None = None,  # [B, *S]
    unit_length: bool = False,
    require_agreement: bool = False,
) -> tuple[Tensor, Tensor]:  # cluster_sum [C, K, d], cluster_count [C, K]
    """Weighted sum and count of the embeddings of every cluster (MPER section II-A); the mean is sum / count.

        cluster_sum[c, k] = sum of weight * z,  cluster_count[c, k] = sum of weight,
        over the voxels with label c whose nearest prototype of class c is k (by cosine, the lowest k on ties)

    z: float32, bfloat16 or float16 (float64 runs on the reference). Contiguous and channels-last are read in
        place, other strides are copied first.
    prototypes: float32 or z's dtype.
    labels: any integer dtype; negative labels are left out.
    weight: bool, uint8 or floating point; 1 everywhere by default.
    unit_length: sum z / max(|z|, 1e-6) instead of z.
    require_agreement: take only voxels whose label is also the class of greatest similarity (lowest on ties).

    cluster_sum is float32 (float64 for float64 input), cluster_count float64. They come apart so that those
    of several calls can be added before dividing. Not differentiable. NaN or infinity in a voxel of a cluster
    spoils that cluster's sum, on some backends all sums. Raises ValueError on wrong shapes or dtypes, and on a
    CPU for labels >= C.
    """
    checks.check_prototypes(z, prototypes)
    checks.check_per_voxel("labels", labels, z, checks.INTEGER_DTYPES)
    checks.check_per_voxel("weight", weight, z, (*checks.WEIGHT_DTYPES, z.dtype))
    backend = backends.select("cluster_mean", z, *prototypes.shape)
    if backend == "reference":
        return reference.cluster_mean(
            z, prototypes, labels, weight=weight, unit_length=unit_length, require_agreement=require_agreement
        )
    cluster_sum, cluster_count = sum_over_processes(
        *torch.ops.semiseg_kernels.cluster_mean_forward(
            z.detach(),
            prototypes.detach().contiguous(),
            backends.as_kernel_input(labels),
            backends.as_kernel_input(weight),
            unit_length,
            require_agreement,
            backend,
        )
    )
    return cluster_sum, cluster_count


def _fake_forward(
    z: Tensor,
    prototypes: Tensor,
    labels: Tensor,
    weight: Tensor | None,
    unit_length: bool,
    require_agreement: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    return (
        z.new_empty(prototypes.shape, dtype=torch.float32),
        z.new_empty(prototypes.shape[:2], dtype=torch.float64),
    )


backends.register(
    "cluster_mean_forward(Tensor z, Tensor prototypes, Tensor labels, Tensor? weight, bool unit_length, "
    "bool require_agreement, str backend) -> (Tensor, Tensor)",
    _fake_forward,
)
