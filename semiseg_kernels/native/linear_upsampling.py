"""Launches of upsampling by linear interpolation."""

from typing import Any

from torch import Tensor

from semiseg_kernels.layouts import dense
from semiseg_kernels.linear_upsampling import doubled, halved
from semiseg_kernels.native.extension import launch, voxels


def _sides(x: Tensor) -> dict[str, Any]:
    *depth, height, width = x.shape[2:]
    return {"depth": depth[0] if depth else 1, "height": height, "width": width, "volumes": bool(depth)}


def forward(
    backend: str,
    x: Tensor,  # [B, C, *S]
) -> Tensor:  # [B, C, *2S]
    read = dense(x)
    y = doubled(read)
    launch(
        backend,
        "linear_upsampling_forward",
        x.device,
        x=voxels(read.flatten(2)),
        y=voxels(y.flatten(2)),
        **_sides(x),
    )
    return y


def backward(
    backend: str,
    grad_y: Tensor,  # [B, C, *2S]
    channels_last: bool,  # the memory format of the gradient
) -> Tensor:  # [B, C, *S]
    upstream, grad_x = dense(grad_y), halved(grad_y, channels_last)
    launch(
        backend,
        "linear_upsampling_backward",
        grad_y.device,
        grad_x=voxels(grad_x.flatten(2)),
        grad_y=voxels(upstream.flatten(2)),
        **_sides(grad_x),
    )
    return grad_x
