"""The operations by way of a matrix product: normalise once, multiply with all prototypes, reduce.

Everything up to the scores is in the dtype of the embeddings, so that bfloat16 runs on tensor cores.
"""

import torch
from torch import Tensor

from semiseg_kernels.reference.cluster_mean import cluster_sums
from semiseg_kernels.reference.common import flatten
from semiseg_kernels.reference.dice_ce import one_hot, region_losses
from semiseg_kernels.reference.prototype_info_nce import contrast, nearest_prototype

TEMPERATURE = 0.1


def scores(
    z: Tensor,  # [B, d, *S]
    prototypes: Tensor,  # [C, K, d]
) -> Tensor:  # [B * N, C * K]
    """Cosine of every voxel with every prototype."""
    voxels = z.flatten(2).movedim(1, -1).flatten(0, 1)  # [B * N, d]
    unit_prototypes = torch.nn.functional.normalize(prototypes.flatten(0, 1), dim=1).to(z.dtype)
    return torch.nn.functional.normalize(voxels, dim=1) @ unit_prototypes.T


def gemm_similarity(
    z: Tensor,  # [B, d, *S]
    prototypes: Tensor,  # [C, K, d]
) -> tuple[Tensor, ...]:  # similarity, index [B, C, *S]
    best = scores(z, prototypes).unflatten(1, prototypes.shape[:2]).max(dim=2)
    batch, _, *spatial = z.shape
    return tuple(values.unflatten(0, (batch, *spatial)).movedim(-1, 1) for values in best)


def gemm_info_nce(
    z: Tensor,  # [B, d, *S]
    prototypes: Tensor,  # [C, K, d]
) -> Tensor:  # scalar
    logits = scores(z, prototypes)
    return torch.nn.functional.cross_entropy(logits.float() / TEMPERATURE, logits.argmax(dim=1))


def gemm_head(
    z: Tensor,  # [B, d, *S]
    prototypes: Tensor,  # [C, K, d]
    labels: Tensor,  # [B, *S]
    regions: Tensor,  # [B, *S]
    weight: Tensor,  # [B, *S]
) -> tuple[Tensor, ...]:  # ce [2], dice [2], info_nce, cluster_sum [C, K, d], cluster_count [C, K]
    num_classes, per_class, _ = prototypes.shape
    cosines = scores(z, prototypes).float().view(z.shape[0], -1, num_classes, per_class)
    cosines = cosines.movedim(1, -1)  # [B, C, K, N]
    log_probability = (cosines.max(dim=2).values / TEMPERATURE).log_softmax(dim=1)
    flat_labels = labels.flatten(1).long()
    keep = flat_labels >= 0
    target = one_hot(flat_labels, num_classes).to(log_probability.dtype)
    ce, dice = region_losses(log_probability, target, keep, regions, num_regions=2, squared=True, first_class=0)
    info_nce = contrast(cosines, nearest_prototype(cosines), keep, TEMPERATURE)
    sums = cluster_sums(flatten(z), cosines, flat_labels, weight, unit_length=False, require_agreement=False)
    return ce, dice, info_nce, *sums
