"""Prototype similarity: cosine of every voxel with the nearest prototype of each class."""

from typing import Any

import torch
from torch import Tensor

from . import backends, checks, reference
from .differentiation import once_differentiable
from .reference.prototype_similarity import index_dtype


def prototype_similarity(
    z: Tensor,  # [B, d, *S]
    prototypes: Tensor,  # [C, K, d]
) -> tuple[Tensor, Tensor]:  # similarity [B, C, *S], index [B, C, *S]
    """Cosine of every voxel with its nearest prototype of each class, and which one that is (MPER eq. 1).

        similarity[b, c, s] = max_k unit(z[b, :, s]) . unit(prototypes[c, k]),  unit(v) = v / max(|v|, 1e-6)

    z: float32, bfloat16 or float16 (float64 runs on the reference). Contiguous and channels-last are read in
        place, other strides are copied first.
    prototypes: float32 or z's dtype; no gradient flows to them.

    similarity has z's dtype and is differentiable in z, with gradient 0 where |z| < 1e-6. index is uint8
    (int16 when K > 256), the lowest k on ties. NaN in a voxel gives similarity NaN. Raises ValueError on
    wrong shapes or dtypes.
    """
    checks.check_prototypes(z, prototypes)
    backend = backends.select("prototype_similarity", z, *prototypes.shape)
    if backend == "reference":
        return reference.prototype_similarity(z, prototypes)
    return _PrototypeSimilarity.apply(z, prototypes.detach().contiguous(), backend)


class _PrototypeSimilarity(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, prototypes: Tensor, backend: str) -> tuple[Tensor, Tensor]:
        similarity, index = torch.ops.semiseg_kernels.prototype_similarity_forward(z, prototypes, backend)
        ctx.save_for_backward(z, prototypes, index)
        ctx.mark_non_differentiable(index)
        ctx.set_materialize_grads(False)  # the index's would be zeros as large as it
        ctx.backend = backend
        return similarity, index

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_similarity: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        if grad_similarity is None:
            return None, None, None
        z, prototypes, index = ctx.saved_tensors
        grad_z = torch.ops.semiseg_kernels.prototype_similarity_backward(
            grad_similarity.contiguous(), z, prototypes, index, ctx.backend
        )
        return grad_z, None, None


def _fake_forward(z: Tensor, prototypes: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    shape = (z.shape[0], prototypes.shape[0], *z.shape[2:])
    return z.new_empty(shape), z.new_empty(shape, dtype=index_dtype(prototypes.shape[1]))


def _fake_backward(grad_similarity: Tensor, z: Tensor, *rest: Any) -> Tensor:
    return torch.empty_like(z)


backends.register(
    "prototype_similarity_forward(Tensor z, Tensor prototypes, str backend) -> (Tensor, Tensor)",
    _fake_forward,
)
backends.register(
    "prototype_similarity_backward(Tensor grad_similarity, Tensor z, Tensor prototypes, Tensor index, "
    "str backend) -> Tensor",
    _fake_backward,
)
