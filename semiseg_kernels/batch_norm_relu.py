"""Batch normalisation and the ReLU behind it."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import backends, checks, process_group, reference
from .recomputation import offer_recomputation
from .reference.batch_norm_relu import move_running_statistics


def batch_norm_relu(
    x: Tensor,  # [B, C, *S]
    weight: Tensor,  # [C]
    bias: Tensor,  # [C]
    running_mean: Tensor,  # [C]
    running_variance: Tensor,  # [C]
    momentum: float = 0.1,
    epsilon: float = 1e-5,
    negative_slope: float = 0.0,
) -> Tensor:  # [B, C, *S]
    """Batch normalisation by the batch's own statistics, then ReLU, leaky with a slope other than 0; for training.

        h = weight (x - mean) / sqrt(variance + epsilon) + bias,  y = h where h > 0, else negative_slope h

    with mean and mean square deviation over the voxels of the whole batch, per channel.

    x: float32, bfloat16 or float16 (float64 runs on the reference). Contiguous and channels-last are read in
        place, other strides are copied first; y comes in x's dtype and memory format.
    running_mean, running_variance: moved in place to (1 - momentum) running + momentum batch, with the unbiased
        variance.

    Differentiable in x, weight and bias; of the activations x alone is kept for that. Raises ValueError on wrong
    shapes or dtypes, and where a channel has fewer than two voxels.
    """
    checks.check_voxels("x", x)
    given = {
        "weight": weight, "bias": bias, "running_mean": running_mean, "running_variance": running_variance,
    }  # fmt: skip
    for name, values in given.items():
        checks.check_dtype(name, values, (torch.float32, x.dtype))
        checks.check_shape(name, values, (x.shape[1],))
        checks.check_device(name, values, x)
        if name.startswith("running"):
            checks.check_written(name, values)
    if x.numel() < 2 * x.shape[1]:
        raise ValueError(f"x has shape {list(x.shape)}, accepted are at least two voxels")
    backend = backends.select("batch_norm_relu", x, 1, 1, x.shape[1])
    if backend == "reference":
        return reference.batch_norm_relu(
            x, weight, bias, running_mean, running_variance, momentum, epsilon, negative_slope
        )
    mean, variance, count = _statistics(x.detach(), backend)
    y, parameters = _BatchNormReLU.apply(
        x, weight, bias, mean, variance, count, float(epsilon), float(negative_slope), backend
    )
    offer_recomputation(
        y,
        lambda: torch.ops.semiseg_kernels.batch_norm_relu_forward(
            x.detach(), parameters, float(negative_slope), backend
        ),
    )
    move_running_statistics(running_mean, running_variance, mean, variance, count, momentum)
    return y


def _statistics(
    x: Tensor,  # [B, C, *S]
    backend: str,
) -> tuple[Tensor, Tensor, Tensor | int]:
    """Mean and mean square deviation [C] float64 of all processes' images, and the number of voxels."""
    mean, variance = torch.ops.semiseg_kernels.batch_norm_relu_statistics(x, backend)
    voxels = x.numel() // x.shape[1]
    group = process_group.current_group()
    if group is None:
        return mean, variance, voxels
    # torch.tensor would copy from the host, which waits for a GPU.
    own = torch.full((), voxels, dtype=torch.float64, device=x.device)
    count, first, second = process_group.all_reduce(group, own, own * mean, own * (variance + mean.square()))
    mean = first / count
    return mean, (second / count - mean.square()).clamp_min(0), count


class _BatchNormReLU(torch.autograd.Function):
    # Numbers of every channel are float64, a small kernel each on a GPU: the fewer of them the better.

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        mean: Tensor,
        variance: Tensor,
        count: Tensor | int,
        epsilon: float,
        negative_slope: float,
        backend: str,
    ) -> tuple[Tensor, Tensor]:
        inverse = (variance + epsilon).rsqrt()
        scale = weight * inverse
        # The kernels take distances from the rounded mean; what it lacks goes into the bias, and below into the offset.
        rounding = mean - mean.float()
        parameters = torch.stack(
            [mean, scale, torch.addcmul(bias.double(), scale, rounding, value=-1)]
        ).float()
        ctx.save_for_backward(x, parameters, rounding, inverse)
        ctx.dtypes = weight.dtype, bias.dtype
        ctx.count, ctx.negative_slope, ctx.backend = count, negative_slope, backend
        ctx.group = process_group.current_group()
        y = torch.ops.semiseg_kernels.batch_norm_relu_forward(x, parameters, negative_slope, backend)
        ctx.mark_non_differentiable(parameters)
        return y, parameters

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        operations = torch.ops.semiseg_kernels
        x, parameters, rounding, inverse = ctx.saved_tensors
        sums = operations.batch_norm_relu_sums(grad_y, x, parameters, ctx.negative_slope, ctx.backend)
        sums[1].addcmul_(sums[0], rounding, value=-1)
        weight_dtype, bias_dtype = ctx.dtypes
        grad_weight, grad_bias = (sums[1] * inverse).to(weight_dtype), sums[0].to(bias_dtype)
        if ctx.group is not None:
            (sums,) = process_group.all_reduce(ctx.group, sums)
        mean_gradient, mean_product = sums / ctx.count
        tilt = mean_product * inverse.square()
        correction = torch.stack([torch.addcmul(mean_gradient, tilt, rounding, value=-1), tilt]).float()
        grad_x = operations.batch_norm_relu_backward(
            grad_y, x, parameters, correction, ctx.negative_slope, ctx.backend
        )
        return grad_x, grad_weight, grad_bias, *[None] * 6


def _fake_statistics(x: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    mean = x.new_empty((x.shape[1],), dtype=torch.float64)
    return mean, torch.empty_like(mean)


def _fake_forward(x: Tensor, parameters: Tensor, negative_slope: float, backend: str) -> Tensor:
    return torch.empty_like(x)


def _fake_sums(grad_y: Tensor, x: Tensor, parameters: Tensor, negative_slope: float, backend: str) -> Tensor:
    return x.new_empty((2, x.shape[1]), dtype=torch.float64)


def _fake_backward(
    grad_y: Tensor, x: Tensor, parameters: Tensor, correction: Tensor, negative_slope: float, backend: str
) -> Tensor:
    return torch.empty_like(x)


backends.register("batch_norm_relu_statistics(Tensor x, str backend) -> (Tensor, Tensor)", _fake_statistics)
backends.register(
    "batch_norm_relu_forward(Tensor x, Tensor parameters, float negative_slope, str backend) -> Tensor",
    _fake_forward,
)
backends.register(
    "batch_norm_relu_sums(Tensor grad_y, Tensor x, Tensor parameters, float negative_slope, str backend) -> Tensor",
    _fake_sums,
)
backends.register(
    "batch_norm_relu_backward(Tensor grad_y, Tensor x, Tensor parameters, Tensor correction, float negative_slope, "
    "str backend) -> Tensor",
    _fake_backward,
)
