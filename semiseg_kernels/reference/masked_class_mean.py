"""Reference of the masked class mean."""

import torch
from torch import Tensor

from ..process_group import sum_over_processes
from .common import bmm, flatten


def masked_class_mean(
    z: Tensor,  # [B, d, *S]
    weight: Tensor,  # [B, C, *S]
) -> Tensor:  # [C, d]
    z = flatten(z)
    share = weight.detach().flatten(2).to(z.dtype)
    total = share.sum(dim=(0, 2), dtype=torch.float64).unsqueeze(1)  # [C, 1]
    summed = bmm(share, z.transpose(1, 2)).sum(dim=0)
    summed, total = sum_over_processes(summed, total)
    mean = summed / torch.where(total != 0, total, 1).to(z.dtype)
    return torch.where(total != 0, mean, 0)
