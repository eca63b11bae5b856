"""Momentum update in Triton.

p <- momentum p + (1 - momentum) sum / count  where count is not 0
"""

import triton
import triton.language as tl
from torch import Tensor

from semiseg_kernels.triton.launch import in_two, launch

BLOCK = 1024


@triton.jit(do_not_specialize=["size", "D"])
def _forward(
    prototypes,  # [C, K, D], updated in place
    cluster_sum,  # [C, K, D]
    cluster_count,  # [C, K] float64
    momentum,
    momentum_rest,  # see in_two
    size,  # C * K * D
    D,
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    count = tl.load(cluster_count + at // D, mask=at < size, other=0)
    kept = (at < size) & (count != 0)
    eta = tl.cast(momentum, tl.float64) + momentum_rest
    p = tl.load(prototypes + at, mask=kept, other=0).to(tl.float64)
    mean = tl.load(cluster_sum + at, mask=kept, other=0).to(tl.float64) / tl.where(kept, count, 1)
    updated = eta * p + (1 - eta) * mean
    tl.store(prototypes + at, updated.to(tl.float32).to(prototypes.dtype.element_ty), mask=kept)


def forward(
    prototypes: Tensor,  # [C, K, d], updated in place
    cluster_sum: Tensor,  # [C, K, d]
    cluster_count: Tensor,  # [C, K]
    momentum: float,
) -> None:
    updated = prototypes.contiguous()
    size = updated.numel()
    momentum, momentum_rest = in_two(momentum)
    launch(
        _forward, (triton.cdiv(size, BLOCK),), prototypes, num_warps=4,
        prototypes=updated, cluster_sum=cluster_sum.contiguous(), cluster_count=cluster_count.contiguous(),
        momentum=momentum, momentum_rest=momentum_rest, size=size, D=prototypes.shape[2], BLOCK=BLOCK,
    )  # fmt: skip
    if updated.data_ptr() != prototypes.data_ptr():
        prototypes.copy_(updated)
