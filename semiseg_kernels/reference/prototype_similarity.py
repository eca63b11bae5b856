"""Reference of prototype similarity."""

import torch
from torch import Tensor

from .common import cosine, flatten


def index_dtype(clusters_per_class: int) -> torch.dtype:
    """The smallest integer dtype that counts a class's prototypes."""
    return torch.uint8 if clusters_per_class <= 256 else torch.int16


def prototype_similarity(
    z: Tensor,  # [B, d, *S]
    prototypes: Tensor,  # [C, K, d]
) -> tuple[Tensor, Tensor]:  # [B, C, *S] z.dtype, [B, C, *S] uint8 or int16
    similarity, index = cosine(flatten(z), prototypes).max(dim=2)
    shape = (z.shape[0], prototypes.shape[0], *z.shape[2:])
    return similarity.reshape(shape).to(z.dtype), index.reshape(shape).to(index_dtype(prototypes.shape[1]))
