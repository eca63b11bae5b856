"""Masked class mean in Triton.

mean[c] = sum_v weight[c, v] z[v] / total[c],  total[c] = sum_v weight[c, v];  0 where total[c] = 0
grad_z[v] = sum_c weight[c, v] grad_mean[c] / total[c]
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from semiseg_kernels.layouts import empty_gradient, finish_gradient
from semiseg_kernels.triton.class_products import mix_by_class, sum_by_class, sums_of_all
from semiseg_kernels.triton.launch import Voxels, as_voxels, launch

QUOTIENTS = 256  # of a program of _divide


@triton.jit(do_not_specialize=["size", "D"])
def _divide(
    rows,  # [C, D]
    total,  # [C] float64
    quotient,  # [C, D] float32, 0 where the total is
    size,  # C * D
    D,
    QUOTIENTS: tl.constexpr,
):
    at = tl.program_id(0) * QUOTIENTS + tl.arange(0, QUOTIENTS)
    divisor = tl.load(total + at // D, mask=at < size, other=0)
    kept = divisor != 0
    value = tl.load(rows + at, mask=kept, other=0).to(tl.float64) / tl.where(kept, divisor, 1)
    tl.store(quotient + at, value.to(tl.float32), mask=at < size)


def _over_total(
    rows: Tensor,  # [C, d]
    total: Tensor,  # [C]
) -> Tensor:  # [C, d] float32
    quotient = torch.empty(rows.shape, dtype=torch.float32, device=rows.device)
    size = rows.numel()
    launch(
        _divide, (triton.cdiv(size, QUOTIENTS),), rows, num_warps=4,
        rows=rows, total=total, quotient=quotient, size=size, D=rows.shape[1], QUOTIENTS=QUOTIENTS,
    )  # fmt: skip
    return quotient


def _read_weight(
    weight: Tensor,  # [B, C, *S]
) -> Voxels:
    return as_voxels(weight.view(torch.uint8) if weight.dtype == torch.bool else weight)


def forward(
    z: Tensor,  # [B, d, *S]
    weight: Tensor,  # [B, C, *S]
) -> tuple[Tensor, Tensor]:  # mean [C, d] float32, sums of the weights [C] float64
    C, d = weight.shape[1], z.shape[1]
    sums = sums_of_all(sum_by_class(as_voxels(z), _read_weight(weight)))
    total = sums[C * d :].clone()
    return _over_total(sums[: C * d].view(C, d), total), total


def backward(
    grad_mean: Tensor,  # [C, d]
    total: Tensor,  # [C]
    z: Tensor,  # [B, d, *S]
    weight: Tensor,  # [B, C, *S]
) -> Tensor:  # [B, d, *S]
    gradient, written = empty_gradient(z)
    share = _over_total(grad_mean.contiguous(), total.contiguous()).expand(z.shape[0], -1, -1)
    mix_by_class(_read_weight(weight), share, as_voxels(written))
    return finish_gradient(gradient, written)
