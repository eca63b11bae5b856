"""Launches of the convolutions between two resolutions."""

import torch
from torch import Tensor

from semiseg_kernels.native.convolution import (
    empty_rows,
    empty_taps,
    finish_rows,
    geometry,
    laid_out_as_weight,
    padded_bias,
    rows,
    taps,
)
from semiseg_kernels.native.extension import address, launch


def forward(
    backend: str,
    x: Tensor,  # [B, I, *2S]
    weight: Tensor,  # [O, I, *2]
    bias: Tensor | None,  # [O]
    negative_slope: float,
) -> Tensor:  # [B, O, *S]
    coarse = torch.Size(side // 2 for side in x.shape[2:])
    return _convolve(
        "strided_convolution_forward", backend, x, weight, bias, negative_slope, None, coarse, coarse, 0
    )


def transposed(
    backend: str,
    x: Tensor,  # [B, O, *S]
    weight: Tensor,  # [O, I, *2]
    bias: Tensor | None,  # [I]
    negative_slope: float,
    added: Tensor | None,  # [B, I, *2S]
) -> Tensor:  # [B, I, *2S]
    coarse, fine = x.shape[2:], torch.Size(2 * side for side in x.shape[2:])
    return _convolve(
        "strided_convolution_transposed", backend, x, weight, bias, negative_slope, added, coarse, fine, 1
    )


def weight(
    backend: str,
    fine: Tensor,  # [B, I, *2S]
    coarse: Tensor,  # [B, O, *S]
    weight: Tensor,  # [O, I, *2], for its strides
) -> Tensor:  # [O, I, *2]
    fine_rows, coarse_rows = rows(fine), rows(coarse)
    gradient = empty_taps(weight)
    launch(
        backend,
        "strided_convolution_weight",
        fine.device,
        **geometry(coarse.shape[0], coarse.shape[2:], gradient, out_axis=0),
        fine=fine_rows.data_ptr(),
        coarse=coarse_rows.data_ptr(),
        grad_weight=gradient.data_ptr(),
    )
    return laid_out_as_weight(weight, gradient)


def _convolve(
    name: str,
    backend: str,
    x: Tensor,  # [B, channels read, *]
    weight: Tensor,  # [O, I, *2]
    bias: Tensor | None,  # [channels written]
    negative_slope: float,
    added: Tensor | None,  # [B, channels written, *written]
    coarse: torch.Size,
    written: torch.Size,  # sides
    axis: int,  # of the weight, for the channels written
) -> Tensor:  # [B, channels written, *written]
    read, matrix, offset = rows(x), taps(weight), padded_bias(bias)
    summand = None if added is None else rows(added)
    y = empty_rows((x.shape[0], matrix.shape[axis], *written))
    launch(
        backend,
        name,
        x.device,
        **geometry(x.shape[0], coarse, matrix, out_axis=0),
        x=read.data_ptr(),
        weight=matrix.data_ptr(),
        bias=address(offset),
        negative_slope=negative_slope,
        added=address(summand),
        y=y.data_ptr(),
    )
    return finish_rows(y, weight.shape[axis], x.dtype)
