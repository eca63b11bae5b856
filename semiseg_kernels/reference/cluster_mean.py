"""Reference of the cluster sums behind a cluster's mean."""

import torch
from torch import Tensor

from ..process_group import sum_over_processes
from .common import bmm, clamped_norm, class_labels, cosine, flatten
from .prototype_info_nce import nearest_prototype_of_class


@torch.no_grad()
def cluster_mean(
    z: Tensor,  # [B, d, *S]
    prototypes: Tensor,  # [C, K, d]
    labels: Tensor,  # [B, *S]
    *,
    weight: Tensor | None = None,  # [B, *S]
    unit_length: bool = False,
    require_agreement: bool = False,
) -> tuple[Tensor, Tensor]:  # [C, K, d], [C, K]
    z = flatten(z)
    flat_labels = class_labels(labels, prototypes.shape[0])
    return cluster_sums(z, cosine(z, prototypes), flat_labels, weight, unit_length, require_agreement)


@torch.no_grad()
def cluster_sums(
    z: Tensor,  # [B, d, N]
    cosines: Tensor,  # [B, C, K, N]
    labels: Tensor,  # [B, N]
    weight: Tensor | None,  # [B, *S]
    unit_length: bool,
    require_agreement: bool,
) -> tuple[Tensor, Tensor]:  # [C, K, d] in z.dtype, [C, K] float64
    """Per cluster the weighted sum of z and the sum of the weights."""
    num_classes, per_class = cosines.shape[1:3]
    cluster = nearest_prototype_of_class(cosines, labels)
    keep = labels >= 0
    if require_agreement:
        keep = keep & (cosines.amax(dim=2).max(dim=1).indices == labels)
    clusters = torch.arange(num_classes * per_class, device=z.device).unsqueeze(1)
    share = (cluster.unsqueeze(1) == clusters) & keep.unsqueeze(1)  # [B, C * K, N]
    if weight is None:
        count = share.sum(dim=(0, 2)).double()
        share = share.to(z.dtype)
    else:
        share = share * weight.flatten(1).to(z.dtype).unsqueeze(1)
        count = share.sum(dim=(0, 2), dtype=torch.float64)
    z = torch.where(share.any(dim=1, keepdim=True), z, 0)  # NaN of a voxel in no cluster is in none
    if unit_length:
        share = share / clamped_norm(z, dim=1)
    summed = bmm(share, z.transpose(1, 2)).sum(dim=0)
    summed, count = sum_over_processes(summed, count)
    return summed.view(num_classes, per_class, -1), count.view(num_classes, per_class)
