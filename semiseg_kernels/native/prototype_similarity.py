"""Launches of the prototype similarity."""

import torch
from torch import Tensor

from semiseg_kernels.layouts import empty_gradient, finish_gradient, float_prototypes, readable
from semiseg_kernels.native.extension import launch, voxels
from semiseg_kernels.reference.prototype_similarity import index_dtype


def forward(
    backend: str,
    z: Tensor,  # [B, d, *S]
    prototypes: Tensor,  # [C, K, d]
) -> tuple[Tensor, Tensor]:  # similarity, index: [B, C, *S]
    C, K, _ = prototypes.shape
    shape = (z.shape[0], C, *z.shape[2:])
    similarity = torch.empty(shape, dtype=z.dtype, device=z.device)
    index = torch.empty(shape, dtype=index_dtype(K), device=z.device)
    read, points = readable(z), float_prototypes(prototypes)
    launch(
        backend,
        "prototype_similarity_forward",
        z.device,
        z=voxels(read),
        prototypes=points.data_ptr(),
        C=C,
        K=K,
        similarity=voxels(similarity.flatten(2)),
        index=voxels(index.flatten(2)),
    )
    return similarity, index


def backward(
    backend: str,
    grad_similarity: Tensor,  # [B, C, *S]
    z: Tensor,  # [B, d, *S]
    prototypes: Tensor,  # [C, K, d]
    index: Tensor,  # [B, C, *S]
) -> Tensor:  # [B, d, *S]
    C, K, _ = prototypes.shape
    gradient, written = empty_gradient(z)
    read, points = readable(z), float_prototypes(prototypes)
    upstream, winners = readable(grad_similarity), index.contiguous().flatten(2)
    launch(
        backend,
        "prototype_similarity_backward",
        z.device,
        z=voxels(read),
        prototypes=points.data_ptr(),
        C=C,
        K=K,
        grad_similarity=voxels(upstream),
        index=voxels(winners),
        grad_z=voxels(written),
    )
    return finish_gradient(gradient, written)
