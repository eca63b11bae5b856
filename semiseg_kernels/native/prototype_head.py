"""Launches of the prototype head."""

import torch
from torch import Tensor

from semiseg_kernels.dice_ce import statistics_size
from semiseg_kernels.layouts import empty_gradient, finish_gradient, float_prototypes, readable
from semiseg_kernels.native.extension import address, check_highest, launch, voxel_map, voxels
from semiseg_kernels.reference.prototype_similarity import index_dtype


def forward(
    backend: str,
    z: Tensor,  # [B, d, *S]
    prototypes: Tensor,  # [C, K, d]
    labels: Tensor | None,  # [B, *S]
    regions: Tensor | None,  # [B, *S]
    weight: Tensor | None,  # [B, *S]
    num_regions: int,
    class_temperature: float,
    temperature: float,
    squared: bool,
    return_similarity: bool,
    positive: str,
    normalize: bool,
    ignore_prototype: int,
    unit_length: bool,
    require_agreement: bool,
) -> tuple[Tensor, ...]:
    """similarity, index, ce, dice, info_nce, cluster_sum, cluster_count, statistics; empty where not computed."""
    C, K, d = prototypes.shape
    shape = (z.shape[0], C, *z.shape[2:]) if return_similarity else (0,)
    similarity = torch.empty(shape, dtype=z.dtype, device=z.device)
    index = torch.empty(shape, dtype=index_dtype(K), device=z.device)
    labelled = labels is not None
    ce = torch.empty(num_regions if labelled else 0, dtype=torch.float32, device=z.device)
    dice = torch.empty_like(ce)
    info_nce = torch.empty((), dtype=torch.float32, device=z.device)
    cluster_sum = torch.empty((C, K, d) if labelled else (0,), dtype=torch.float32, device=z.device)
    cluster_count = torch.empty((C, K) if labelled else (0,), dtype=torch.float64, device=z.device)
    size = 1 + (statistics_size(num_regions, C) if labelled else 0)
    statistics = torch.empty(size, dtype=torch.float64, device=z.device)
    read, points = readable(z), float_prototypes(prototypes)
    label_map, region_map, weight_map = voxel_map(labels), voxel_map(regions), voxel_map(weight)
    highest = launch(
        backend,
        "prototype_head_forward",
        z.device,
        z=voxels(read),
        prototypes=points.data_ptr(),
        C=C,
        K=K,
        labels=voxels(label_map),
        regions=voxels(region_map),
        weight=voxels(weight_map),
        num_regions=num_regions,
        class_temperature=class_temperature,
        temperature=temperature,
        squared=squared,
        normalize=normalize,
        positive_of_label=positive == "label",
        ignore_prototype=ignore_prototype,
        unit_length=unit_length,
        require_agreement=require_agreement,
        similarity=voxels(similarity.flatten(2) if return_similarity else None),
        index=voxels(index.flatten(2) if return_similarity else None),
        ce=ce.data_ptr(),
        dice=dice.data_ptr(),
        info_nce=info_nce.data_ptr(),
        cluster_sum=cluster_sum.data_ptr(),
        cluster_count=cluster_count.data_ptr(),
        statistics=statistics.data_ptr(),
    )
    check_highest(highest, labels=C, regions=num_regions)
    return similarity, index, ce, dice, info_nce, cluster_sum, cluster_count, statistics


def backward(
    backend: str,
    grad_similarity: Tensor | None,  # [B, C, *S]
    grad_ce: Tensor | None,  # [R]
    grad_dice: Tensor | None,  # [R]
    grad_info_nce: Tensor | None,  # []
    z: Tensor,  # [B, d, *S]
    prototypes: Tensor,  # [C, K, d]
    labels: Tensor | None,  # [B, *S]
    regions: Tensor | None,  # [B, *S]
    statistics: Tensor,
    num_regions: int,
    class_temperature: float,
    temperature: float,
    squared: bool,
    positive: str,
    normalize: bool,
    ignore_prototype: int,
) -> Tensor:  # [B, d, *S]
    C, K, _ = prototypes.shape
    gradient, written = empty_gradient(z)
    read, points = readable(z), float_prototypes(prototypes)
    label_map, region_map = voxel_map(labels), voxel_map(regions)
    upstream = None if grad_similarity is None else readable(grad_similarity)
    by_ce, by_dice, by_info_nce = (
        None if grad is None else grad.to(torch.float32).contiguous()
        for grad in (grad_ce, grad_dice, grad_info_nce)
    )
    launch(
        backend,
        "prototype_head_backward",
        z.device,
        z=voxels(read),
        prototypes=points.data_ptr(),
        C=C,
        K=K,
        labels=voxels(label_map),
        regions=voxels(region_map),
        num_regions=num_regions,
        class_temperature=class_temperature,
        temperature=temperature,
        squared=squared,
        normalize=normalize,
        positive_of_label=positive == "label",
        ignore_prototype=ignore_prototype,
        statistics=statistics.data_ptr(),
        grad_similarity=voxels(upstream),
        grad_ce=address(by_ce),
        grad_dice=address(by_dice),
        grad_info_nce=address(by_info_nce),
        grad_z=voxels(written),
    )
    return finish_gradient(gradient, written)
