"""Masked class mean: per class the mean embedding over a map of weights."""

from typing import Any

import torch
from torch import Tensor

from . import backends, checks, process_group, reference
from .differentiation import once_differentiable


def masked_class_mean(
    z: Tensor,  # [B, d, *S]
    weight: Tensor,  # [B, C, *S]
) -> Tensor:  # [C, d]
    """Per class the weighted mean of the embeddings over all voxels of the batch (VCLIPSeg eq. 4).

        mean[c] = sum_bs weight[b, c, s] * z[b, :, s] / sum_bs weight[b, c, s]

    z: float32, bfloat16 or float16 (float64 runs on the reference). Contiguous and channels-last are read in
        place, other strides are copied first.
    weight: bool, uint8, float32, bfloat16, float16 or z's dtype; no gradient flows to it.

    The means are float32 (float64 for float64 input), differentiable in z. A class whose weights sum to 0 has
    mean 0 and sends no gradient; `weight.sum(...) == 0` tells it from a class with that mean. NaN in z reaches
    the other classes, whatever the weight there. Raises ValueError on wrong shapes or dtypes.
    """
    checks.check_voxels("z", z)
    checks.check_maps("weight", weight, z, (*checks.WEIGHT_DTYPES, z.dtype))
    backend = backends.select("masked_class_mean", z, weight.shape[1], 1, z.shape[1])
    if backend == "reference":
        return reference.masked_class_mean(z, weight)
    return _MaskedClassMean.apply(z, weight.detach(), backend)


class _MaskedClassMean(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, weight: Tensor, backend: str) -> Tensor:
        mean, total = torch.ops.semiseg_kernels.masked_class_mean_forward(z, weight, backend)
        ctx.group = process_group.current_group()
        if ctx.group is not None:
            summed, total = process_group.all_reduce(ctx.group, mean * total.unsqueeze(1), total)
            mean = process_group.mean(summed, total.unsqueeze(1))
        ctx.save_for_backward(total, z, weight)
        ctx.backend = backend
        return mean

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_mean: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.group is not None:
            (grad_mean,) = process_group.all_reduce(ctx.group, grad_mean)
        grad_z = torch.ops.semiseg_kernels.masked_class_mean_backward(
            grad_mean, *ctx.saved_tensors, ctx.backend
        )
        return grad_z, None, None


def _fake_forward(z: Tensor, weight: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    num_classes = weight.shape[1]
    return (
        z.new_empty((num_classes, z.shape[1]), dtype=torch.float32),
        z.new_empty((num_classes,), dtype=torch.float64),
    )


def _fake_backward(grad_mean: Tensor, total: Tensor, z: Tensor, weight: Tensor, backend: str) -> Tensor:
    return torch.empty_like(z)


backends.register(
    "masked_class_mean_forward(Tensor z, Tensor weight, str backend) -> (Tensor, Tensor)", _fake_forward
)
backends.register(
    "masked_class_mean_backward(Tensor grad_mean, Tensor total, Tensor z, Tensor weight, str backend) -> Tensor",
    _fake_backward,
)
