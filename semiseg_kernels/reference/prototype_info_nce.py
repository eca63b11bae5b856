"""Reference of prototype InfoNCE."""

import torch
from torch import Tensor

from ..process_group import sum_over_processes
from .common import class_labels, cosine, dot, flatten


def prototype_info_nce(
    z: Tensor,  # [B, d, *S]
    prototypes: Tensor,  # [C, K, d]
    *,
    temperature: float = 0.1,
    labels: Tensor | None = None,  # [B, *S]
    weight: Tensor | None = None,  # [B, *S]
    normalize: bool = True,
    ignore_prototype: int | None = None,
) -> Tensor:  # scalar
    z = flatten(z)
    cosines = cosine(z, prototypes)
    positive = nearest_prototype(cosines)
    keep = torch.ones_like(positive, dtype=torch.bool)
    if labels is not None:
        flat_labels = class_labels(labels, prototypes.shape[0])
        positive = nearest_prototype_of_class(cosines, flat_labels)
        keep = flat_labels >= 0
    if ignore_prototype is not None:
        keep = keep & (positive != ignore_prototype)
    scores = cosines if normalize else dot(z, prototypes)
    return contrast(scores, positive, keep, temperature, weight)


def nearest_prototype(
    cosines: Tensor,  # [B, C, K, N]
) -> Tensor:  # [B, N] flat index c * K + k
    """The nearest of all C * K prototypes, the lowest index on ties."""
    return cosines.flatten(1, 2).max(dim=1).indices


def nearest_prototype_of_class(
    cosines: Tensor,  # [B, C, K, N]
    labels: Tensor,  # [B, N]
) -> Tensor:  # [B, N] flat index c * K + k; of class 0 where the label is negative
    """The nearest prototype of each voxel's own class, the lowest index on ties."""
    labels = labels.clamp_min(0)
    index = cosines.max(dim=2).indices.gather(1, labels.unsqueeze(1)).squeeze(1)
    return labels * cosines.shape[2] + index


def contrast(
    scores: Tensor,  # [B, C, K, N]
    positive: Tensor,  # [B, N] flat index
    keep: Tensor,  # [B, N] bool
    temperature: float,
    weight: Tensor | None = None,  # [B, *S]
) -> Tensor:  # scalar
    """Weighted mean of -log softmax(scores / temperature) at the positive over the voxels kept, or 0."""
    logits = scores.flatten(1, 2) / temperature
    loss = logits.logsumexp(dim=1) - logits.gather(1, positive.unsqueeze(1)).squeeze(1)
    if weight is None:
        total = keep.sum().to(loss.dtype)
    else:
        flat_weight = weight.detach().flatten(1).to(loss.dtype)
        keep = keep & (flat_weight != 0)
        loss = loss * flat_weight
        total = torch.where(keep, flat_weight, 0).sum()
    summed, total = sum_over_processes(torch.where(keep, loss, 0).sum(), total)
    return torch.where(total != 0, summed / torch.where(total != 0, total, 1), 0)
