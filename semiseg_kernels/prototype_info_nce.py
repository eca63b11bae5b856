"""Prototype InfoNCE: contrast of every voxel with all prototypes."""

from typing import Any

import torch
from torch import Tensor

from . import backends, checks, process_group, reference
from .differentiation import once_differentiable


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
    """InfoNCE of every voxel against all C * K prototypes, the nearest one as positive (MPER eq. 5).

        loss = logsumexp_ck(s_ck / temperature) - s_p* / temperature,
        averaged as sum(weight * loss) / sum(weight)

    z: float32, bfloat16 or float16 (float64 runs on the reference). Contiguous and channels-last are read in
        place, other strides are copied first.
    prototypes: float32 or z's dtype; no gradient flows to them.
    labels: any integer dtype. Given, the positive p* is the nearest prototype of the voxel's class, and
        negative labels are left out; else p* is the nearest of all. Nearest is by cosine, the lowest index
        on ties.
    weight: bool, uint8 or floating point, to which no gradient flows; voxels of weight 0 are left out.
    normalize: s is the cosine (the default), or the plain dot product.
    ignore_prototype: voxels whose p* is this flat index c * K + k are left out.

    Returns a float32 scalar, 0 when no voxel is kept. Differentiable in z. Raises ValueError on wrong shapes
    or dtypes, and on a CPU for labels >= C.
    """
    checks.check_prototypes(z, prototypes)
    checks.check_per_voxel("labels", labels, z, checks.INTEGER_DTYPES)
    checks.check_per_voxel("weight", weight, z, (*checks.WEIGHT_DTYPES, z.dtype))
    checks.check_positive("temperature", temperature)
    checks.check_ignore_prototype(ignore_prototype, prototypes)
    backend = backends.select("prototype_info_nce", z, *prototypes.shape)
    if backend == "reference":
        return reference.prototype_info_nce(
            z, prototypes, temperature=temperature, labels=labels, weight=weight, normalize=normalize,
            ignore_prototype=ignore_prototype,
        )  # fmt: skip
    return _PrototypeInfoNCE.apply(
        z,
        prototypes.detach().contiguous(),
        backends.as_kernel_input(labels),
        backends.as_kernel_input(weight),
        float(temperature),
        normalize,
        -1 if ignore_prototype is None else ignore_prototype,
        backend,
    )


class _PrototypeInfoNCE(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        z: Tensor,
        prototypes: Tensor,
        labels: Tensor | None,
        weight: Tensor | None,
        temperature: float,
        normalize: bool,
        ignore_prototype: int,
        backend: str,
    ) -> Tensor:
        options = (temperature, normalize, ignore_prototype, backend)
        loss, denominator = torch.ops.semiseg_kernels.prototype_info_nce_forward(
            z, prototypes, labels, weight, *options
        )
        ctx.group = process_group.current_group()
        if ctx.group is not None:
            summed, denominator = process_group.all_reduce(ctx.group, loss * denominator, denominator)
            loss = process_group.mean(summed, denominator)
        ctx.save_for_backward(denominator, z, prototypes, labels, weight)
        ctx.options = options
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.group is not None:
            (grad_loss,) = process_group.all_reduce(ctx.group, grad_loss)
        grad_z = torch.ops.semiseg_kernels.prototype_info_nce_backward(
            grad_loss, *ctx.saved_tensors, *ctx.options
        )
        return grad_z, *[None] * 7


def _fake_forward(
    z: Tensor,
    prototypes: Tensor,
    labels: Tensor | None,
    weight: Tensor | None,
    temperature: float,
    normalize: bool,
    ignore_prototype: int,
    backend: str,
) -> tuple[Tensor, Tensor]:
    return z.new_empty((), dtype=torch.float32), z.new_empty((), dtype=torch.float64)


def _fake_backward(grad_loss: Tensor, denominator: Tensor, z: Tensor, *rest: Any) -> Tensor:
    return torch.empty_like(z)


_ARGUMENTS = (
    "Tensor z, Tensor prototypes, Tensor? labels, Tensor? weight, "
    "float temperature, bool normalize, int ignore_prototype, str backend"
)
backends.register(f"prototype_info_nce_forward({_ARGUMENTS}) -> (Tensor, Tensor)", _fake_forward)
backends.register(
    f"prototype_info_nce_backward(Tensor grad_loss, Tensor denominator, {_ARGUMENTS}) -> Tensor",
    _fake_backward,
)
