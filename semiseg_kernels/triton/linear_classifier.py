"""The linear classifier of every voxel in Triton.

logits[b, c] = sum_j matrix[b, c, j] x[b, j],  x[b, d] = 1, so that the matrix's last column is the bias
grad_x[b, j] = sum_c matrix[b, c, j] grad_logits[b, c]
grad_matrix[b, c, j] = sum over the voxels of image b of grad_logits[b, c] x[b, j]
"""

import torch
from torch import Tensor

from semiseg_kernels.layouts import empty_gradient, finish_gradient
from semiseg_kernels.triton.class_products import mix_by_class, sum_by_class, sums_of_images
from semiseg_kernels.triton.launch import as_voxels


def forward(
    x: Tensor,  # [B, d, *S]
    matrix: Tensor,  # [B, C, d + 1] float32
) -> Tensor:  # [B, C, *S] float32
    logits = x.new_empty((x.shape[0], matrix.shape[1], *x.shape[2:]), dtype=torch.float32)
    weights = matrix.contiguous()
    mix_by_class(as_voxels(x), weights[:, :, :-1].transpose(1, 2), as_voxels(logits), bias=weights[:, :, -1])
    return logits


def backward(
    grad_logits: Tensor,  # [B, C, *S]
    x: Tensor,  # [B, d, *S]
    matrix: Tensor,  # [B, C, d + 1] float32
) -> tuple[Tensor, Tensor]:  # [B, d, *S], [B, C, d + 1] float32
    batch, C, width = matrix.shape
    upstream = as_voxels(grad_logits)
    gradient, written = empty_gradient(x)
    mix_by_class(upstream, matrix.contiguous()[:, :, :-1], as_voxels(written))
    sums = sums_of_images(sum_by_class(as_voxels(x), upstream))[:batch]
    products, totals = sums.split([C * (width - 1), C], dim=1)
    grad_matrix = torch.cat([products.reshape(batch, C, width - 1), totals.unsqueeze(2)], dim=2).float()
    return finish_gradient(gradient, written), grad_matrix
