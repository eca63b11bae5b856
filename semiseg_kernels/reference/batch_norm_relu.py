"""Reference of batch normalisation and the ReLU behind it."""

import torch
from torch import Tensor
from torch.nn import functional

from ..process_group import current_group, sum_over_processes
from .common import accumulation_dtype, activate


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
    if current_group() is None:
        dtype = accumulation_dtype(x)  # PyTorch takes parameters of one dtype only
        moved_mean, moved_variance = running_mean.to(dtype), running_variance.to(dtype)
        normalised = functional.batch_norm(
            x, moved_mean, moved_variance, weight.to(dtype), bias.to(dtype), training=True, momentum=momentum, eps=epsilon
        )
        with torch.no_grad():
            for values, moved in ((running_mean, moved_mean), (running_variance, moved_variance)):
                if moved is not values:
                    values.copy_(moved)
    else:
        normalised = _of_all_processes(x, weight, bias, running_mean, running_variance, momentum, epsilon)
    return activate(normalised, negative_slope)


def move_running_statistics(
    running_mean: Tensor,  # [C]
    running_variance: Tensor,  # [C]
    mean: Tensor,  # [C]
    variance: Tensor,  # [C], biased: the mean square deviation
    count: Tensor | int,  # voxels
    momentum: float,
) -> None:
    """Move them to (1 - momentum) running + momentum batch, in place, with the unbiased variance."""
    with torch.no_grad():
        running_mean.lerp_(mean.to(running_mean.dtype), momentum)
        running_variance.lerp_((variance * (count / (count - 1))).to(running_variance.dtype), momentum)


def _of_all_processes(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor,
    running_variance: Tensor,
    momentum: float,
    epsilon: float,
) -> Tensor:
    wide = x.to(accumulation_dtype(x))
    local_variance, local_mean = torch.var_mean(wide, [0, *range(2, x.dim())], correction=0)
    first, second = local_mean.double(), local_variance.double() + local_mean.double().square()
    voxels = torch.tensor(float(x.numel() // x.shape[1]), dtype=torch.float64, device=x.device)
    count, first, second = sum_over_processes(voxels, voxels * first, voxels * second)
    mean = first / count
    variance = (second / count - mean.square()).clamp_min(0)
    move_running_statistics(running_mean, running_variance, mean, variance, count, momentum)
    scale = weight * (variance + epsilon).rsqrt()
    shift = bias - mean * scale
    of_channels = (-1, *[1] * (x.dim() - 2))
    scale, shift = (value.to(wide.dtype).view(of_channels) for value in (scale, shift))
    return torch.addcmul(shift, wide, scale).to(x.dtype)
