"""Batch normalisation and the ReLU behind it."""

from typing import Any

import torch
from torch import Tensor

from . import backends, checks, process_group, reference
from .differentiation import once_differentiable
from .layouts import is_dense
from .recomputation import offer_recomputation


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
    shapes or dtypes, momentum or slope outside 0..1, an epsilon that is not above 0, and where a channel has fewer than
    two voxels.
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
    checks.check_fraction("momentum", momentum)
    checks.check_positive("epsilon", epsilon)
    checks.check_fraction("negative_slope", negative_slope)
    if x.numel() < 2 * x.shape[1]:
        raise ValueError(f"x has shape {list(x.shape)}, accepted are at least two voxels")
    backend = backends.select("batch_norm_relu", x, 1, 1, x.shape[1])
    if backend == "reference":
        return reference.batch_norm_relu(
            x, weight, bias, running_mean, running_variance, momentum, epsilon, negative_slope
        )
    operations, voxels = torch.ops.semiseg_kernels, x.numel() // x.shape[1]
    with torch.no_grad():
        mean, variance, count = _statistics(x, voxels, backend)
        parameters, exact = operations.batch_norm_relu_parameters(
            mean, variance, weight, bias, running_mean, running_variance, count, voxels, float(momentum),
            float(epsilon), backend,
        )  # fmt: skip
    for values in (running_mean, running_variance):
        # The raw operation has no key that does it: backward would not notice that a saved tensor has changed.
        torch.autograd.graph.increment_version(values)
    y = _BatchNormReLU.apply(
        x, weight, bias, parameters, exact, count, voxels, float(negative_slope), backend
    )
    offer_recomputation(
        y,
        lambda *given: operations.batch_norm_relu_forward(*given, float(negative_slope), backend),
        x.detach(),
        parameters,
    )
    return y


def _statistics(
    x: Tensor,  # [B, C, *S]
    voxels: int,  # of x
    backend: str,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Mean and mean square deviation [C] float64 of all processes' images, and in a group the number of their voxels."""
    mean, variance = torch.ops.semiseg_kernels.batch_norm_relu_statistics(x, backend)
    group = process_group.current_group()
    if group is None:
        return mean, variance, None
    # torch.tensor would copy from the host, which waits for a GPU.
    own = torch.full((), voxels, dtype=torch.float64, device=x.device)
    count, first, second = process_group.all_reduce(group, own, own * mean, own * (variance + mean.square()))
    mean = first / count
    return mean, (second / count - mean.square()).clamp_min(0), count


class _BatchNormReLU(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        parameters: Tensor,
        exact: Tensor,
        count: Tensor | None,
        voxels: int,
        negative_slope: float,
        backend: str,
    ) -> Tensor:
        ctx.save_for_backward(x, parameters, exact)
        ctx.dtypes = weight.dtype, bias.dtype
        ctx.count, ctx.voxels = count, voxels
        ctx.negative_slope, ctx.backend = negative_slope, backend
        ctx.group = process_group.current_group()
        return torch.ops.semiseg_kernels.batch_norm_relu_forward(x, parameters, negative_slope, backend)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        operations = torch.ops.semiseg_kernels
        x, parameters, exact = ctx.saved_tensors
        sums = operations.batch_norm_relu_sums(grad_y, x, parameters, ctx.negative_slope, ctx.backend)
        joined = sums if ctx.group is None else process_group.all_reduce(ctx.group, sums)[0]
        correction, grad_weight, grad_bias = operations.batch_norm_relu_correction(
            sums, joined, exact, ctx.count, ctx.voxels, ctx.backend
        )
        grad_x = operations.batch_norm_relu_backward(
            grad_y, x, parameters, correction, ctx.negative_slope, ctx.backend
        )
        weight_dtype, bias_dtype = ctx.dtypes
        return grad_x, grad_weight.to(weight_dtype), grad_bias.to(bias_dtype), *[None] * 6


def _fake_statistics(x: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    mean = x.new_empty((x.shape[1],), dtype=torch.float64)
    return mean, torch.empty_like(mean)


def _fake_parameters(
    mean: Tensor,
    variance: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor,
    running_variance: Tensor,
    count: Tensor | None,
    voxels: int,
    momentum: float,
    epsilon: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    (channels,) = mean.shape
    return mean.new_empty((3, channels), dtype=torch.float32), mean.new_empty((2, channels))


def _fake_forward(x: Tensor, parameters: Tensor, negative_slope: float, backend: str) -> Tensor:
    return _empty_as_read(x)


def _empty_as_read(x: Tensor) -> Tensor:
    """In the format of x where that is contiguous or channels-last; any other is copied first."""
    return torch.empty_like(x) if is_dense(x) else x.new_empty(x.shape)


def _fake_sums(grad_y: Tensor, x: Tensor, parameters: Tensor, negative_slope: float, backend: str) -> Tensor:
    return x.new_empty((2, x.shape[1]), dtype=torch.float64)


def _fake_correction(
    sums: Tensor, joined: Tensor, exact: Tensor, count: Tensor | None, voxels: int, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    correction = torch.empty_like(sums, dtype=torch.float32)
    return correction, torch.empty_like(correction[0]), torch.empty_like(correction[1])


def _fake_backward(
    grad_y: Tensor, x: Tensor, parameters: Tensor, correction: Tensor, negative_slope: float, backend: str
) -> Tensor:
    return _empty_as_read(x)


backends.register("batch_norm_relu_statistics(Tensor x, str backend) -> (Tensor, Tensor)", _fake_statistics)
backends.register(
    "batch_norm_relu_parameters(Tensor mean, Tensor variance, Tensor weight, Tensor bias, Tensor(a!) running_mean, "
    "Tensor(b!) running_variance, Tensor? count, SymInt voxels, float momentum, float epsilon, str backend) "
    "-> (Tensor, Tensor)",
    _fake_parameters,
)
backends.register(
    "batch_norm_relu_forward(Tensor x, Tensor parameters, float negative_slope, str backend) -> Tensor",
    _fake_forward,
)
backends.register(
    "batch_norm_relu_sums(Tensor grad_y, Tensor x, Tensor parameters, float negative_slope, str backend) -> Tensor",
    _fake_sums,
)
backends.register(
    "batch_norm_relu_correction(Tensor sums, Tensor joined, Tensor exact, Tensor? count, SymInt voxels, str backend) "
    "-> (Tensor, Tensor, Tensor)",
    _fake_correction,
)
backends.register(
    "batch_norm_relu_backward(Tensor grad_y, Tensor x, Tensor parameters, Tensor correction, float negative_slope, "
    "str backend) -> Tensor",
    _fake_backward,
)
