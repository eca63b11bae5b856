from typing import Any

import torch
from torch import Tensor

from semiseg_kernels.native.extension import Voxels, dense, laid_out_as, launch, voxels


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
