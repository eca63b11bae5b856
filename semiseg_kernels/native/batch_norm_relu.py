"""Launches of batch normalisation and the ReLU behind it."""

from typing import Any

import torch
from torch import Tensor

from semiseg_kernels.layouts import dense, laid_out_as
from semiseg_kernels.native.extension import Voxels, address, launch, voxels


def statistics(
    backend: str,
    x: Tensor,  # [B, C, *S]
) -> tuple[Tensor, Tensor]:  # mean and variance [C] float64
    mean = torch.empty(x.shape[1], dtype=torch.float64, device=x.device)
    variance = torch.empty_like(mean)
    read = dense(x)
    launch(
        backend,
        "batch_norm_relu_statistics",
        x.device,
        x=_voxels(read),
        mean=mean.data_ptr(),
        variance=variance.data_ptr(),
    )
    return mean, variance


def parameters(
    backend: str,
    mean: Tensor,  # [C] float64
    variance: Tensor,  # [C] float64
    weight: Tensor,  # [C]
    bias: Tensor,  # [C]
    running_mean: Tensor,  # [C], updated in place
    running_variance: Tensor,  # [C], updated in place
    count: Tensor | None,  # [] float64, voxels of all processes
    voxels: int,  # of x
    momentum: float,
    epsilon: float,
) -> tuple[Tensor, Tensor]:  # [3, C] float32: mean, scale, bias; [2, C] float64: rounding, inverse
    (C,) = mean.shape
    running = running_mean, running_variance
    updated = [values.to(torch.float32).contiguous() for values in running]
    affine = [values.to(torch.float32).contiguous() for values in (weight, bias)]
    result = torch.empty(3, C, dtype=torch.float32, device=mean.device)
    exact = torch.empty(2, C, dtype=torch.float64, device=mean.device)
    launch(
        backend,
        "batch_norm_relu_parameters",
        mean.device,
        mean=mean.data_ptr(),
        variance=variance.data_ptr(),
        weight=affine[0].data_ptr(),
        bias=affine[1].data_ptr(),
        running_mean=updated[0].data_ptr(),
        running_variance=updated[1].data_ptr(),
        count=address(count),
        voxels=voxels,
        channels=C,
        momentum=momentum,
        epsilon=epsilon,
        parameters=result.data_ptr(),
        exact=exact.data_ptr(),
    )
    for own, values in zip(running, updated, strict=True):
        if values is not own:
            own.copy_(values)
    return result, exact


def forward(
    backend: str,
    x: Tensor,  # [B, C, *S]
    parameters: Tensor,  # [3, C] float32: mean, scale, bias
    negative_slope: float,
) -> Tensor:  # [B, C, *S]
    read = dense(x)
    y = torch.empty_like(read)
    launch(
        backend,
        "batch_norm_relu_forward",
        x.device,
        **_normalisation(read, parameters, negative_slope),
        y=_voxels(y),
    )
    return y


def sums(
    backend: str,
    grad_y: Tensor,  # [B, C, *S]
    x: Tensor,  # [B, C, *S]
    parameters: Tensor,  # [3, C] float32
    negative_slope: float,
) -> Tensor:  # [2, C] float64
    read = dense(x)
    upstream = laid_out_as(read, grad_y)
    result = torch.empty(2, x.shape[1], dtype=torch.float64, device=x.device)
    launch(
        backend,
        "batch_norm_relu_sums",
        x.device,
        **_normalisation(read, parameters, negative_slope),
        grad_y=_voxels(upstream),
        sums=result.data_ptr(),
    )
    return result


def correction(
    backend: str,
    sums: Tensor,  # [2, C] float64
    joined: Tensor,  # [2, C] float64, of all processes
    exact: Tensor,  # [2, C] float64: rounding, inverse
    count: Tensor | None,  # [] float64, voxels of all processes
    voxels: int,  # of x
) -> tuple[Tensor, Tensor, Tensor]:  # [2, C]: offset, tilt; [C]: gradients of weight and bias
    C = sums.shape[1]
    result = torch.empty(2, C, dtype=torch.float32, device=sums.device)
    grad_weight, grad_bias = (torch.empty(C, dtype=torch.float32, device=sums.device) for _ in range(2))
    launch(
        backend,
        "batch_norm_relu_correction",
        sums.device,
        sums=sums.data_ptr(),
        joined=joined.data_ptr(),
        exact=exact.data_ptr(),
        count=address(count),
        voxels=voxels,
        channels=C,
        correction=result.data_ptr(),
        grad_weight=grad_weight.data_ptr(),
        grad_bias=grad_bias.data_ptr(),
    )
    return result, grad_weight, grad_bias


def backward(
    backend: str,
    grad_y: Tensor,  # [B, C, *S]
    x: Tensor,  # [B, C, *S]
    parameters: Tensor,  # [3, C] float32
    correction: Tensor,  # [2, C] float32: offset, tilt
    negative_slope: float,
) -> Tensor:  # [B, C, *S]
    read = dense(x)
    upstream = laid_out_as(read, grad_y)
    offset, tilt = correction
    grad_x = torch.empty_like(read)
    launch(
        backend,
        "batch_norm_relu_backward",
        x.device,
        **_normalisation(read, parameters, negative_slope),
        grad_y=_voxels(upstream),
        offset=offset.data_ptr(),
        tilt=tilt.data_ptr(),
        grad_x=_voxels(grad_x),
    )
    return grad_x


def _normalisation(x: Tensor, parameters: Tensor, negative_slope: float) -> dict[str, Any]:
    mean, scale, bias = parameters
    return {
        "x": _voxels(x),
        "mean": mean.data_ptr(),
        "scale": scale.data_ptr(),
        "bias": bias.data_ptr(),
        "negative_slope": negative_slope,
    }


def _voxels(x: Tensor) -> Voxels | None:
    return voxels(x.flatten(2))
