"""The linear classifier of every voxel, with dropout of whole channels folded in."""

from typing import Any

import torch
from torch import Tensor

from . import backends, checks, reference
from .differentiation import once_differentiable


def linear_classifier(
    x: Tensor,  # [B, d, *S]
    weight: Tensor,  # [C, d]
    bias: Tensor,  # [C]
    channel_scale: Tensor | None = None,  # [B, d]
) -> Tensor:  # [B, C, *S]
    """Class logits of every voxel's embedding, a convolution of side 1 in one pass each way.

        logits[b, c, s] = sum_j weight[c, j] channel_scale[b, j] x[b, j, s] + bias[c]

    x: float32, bfloat16 or float16 (float64 runs on the reference). Contiguous and channels-last are read in
        place, other strides are copied first.
    weight, bias: float32 or x's dtype.
    channel_scale: floating point; what dropout of whole channels multiplies them by, 1 where it is not given.

    Logits are float32, float64 where x is, also under autocast. Differentiable in x, weight and bias. Raises ValueError
    on wrong shapes or dtypes.
    """
    checks.check_voxels("x", x)
    checks.check_dtype("weight", weight, (torch.float32, x.dtype))
    if weight.dim() != 2 or weight.shape[1] != x.shape[1] or weight.numel() == 0:
        raise ValueError(f"weight has shape {list(weight.shape)}, accepted is [C, {x.shape[1]}] with C >= 1")
    checks.check_device("weight", weight, x)
    checks.check_dtype("bias", bias, (torch.float32, x.dtype))
    checks.check_shape("bias", bias, (weight.shape[0],))
    checks.check_device("bias", bias, x)
    if channel_scale is not None:
        checks.check_dtype("channel_scale", channel_scale, checks.FLOAT_DTYPES)
        checks.check_shape("channel_scale", channel_scale, tuple(x.shape[:2]))
        checks.check_device("channel_scale", channel_scale, x)
    backend = backends.select("linear_classifier", x, weight.shape[0], 1, x.shape[1])
    if backend == "reference":
        return reference.linear_classifier(x, weight, bias, channel_scale)
    scaled = weight.float().expand(x.shape[0], -1, -1)
    if channel_scale is not None:
        scaled = scaled * channel_scale.float().unsqueeze(1)
    matrix = torch.cat([scaled, bias.float().expand(x.shape[0], -1).unsqueeze(2)], dim=2)
    return _LinearClassifier.apply(x, matrix, backend)


class _LinearClassifier(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, matrix: Tensor, backend: str) -> Tensor:
        ctx.save_for_backward(x, matrix)
        ctx.backend = backend
        return torch.ops.semiseg_kernels.linear_classifier_forward(x, matrix, backend)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logits: Tensor) -> tuple[Tensor | None, ...]:
        x, matrix = ctx.saved_tensors
        grad_x, grad_matrix = torch.ops.semiseg_kernels.linear_classifier_backward(
            grad_logits, x, matrix, ctx.backend
        )
        return grad_x, grad_matrix, None


def _fake_forward(x: Tensor, matrix: Tensor, backend: str) -> Tensor:
    return x.new_empty((x.shape[0], matrix.shape[1], *x.shape[2:]), dtype=torch.float32)


def _fake_backward(grad_logits: Tensor, x: Tensor, matrix: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(matrix, memory_format=torch.contiguous_format)


backends.register("linear_classifier_forward(Tensor x, Tensor matrix, str backend) -> Tensor", _fake_forward)
backends.register(
    "linear_classifier_backward(Tensor grad_logits, Tensor x, Tensor matrix, str backend) -> (Tensor, Tensor)",
    _fake_backward,
)
