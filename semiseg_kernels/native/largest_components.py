"""Launch of the largest components."""

import torch
from torch import Tensor

from semiseg_kernels.layouts import volume_sides
from semiseg_kernels.native.extension import launch


def forward(
    backend: str,
    label: Tensor,  # [B, *S] uint8
    num_classes: int,
) -> Tensor:  # [B, *S] uint8
    label = label.contiguous()
    kept = torch.empty_like(label)
    launch(
        backend,
        "largest_components_forward",
        label.device,
        label=label.data_ptr(),
        B=label.shape[0],
        **volume_sides(label),
        C=num_classes,
        kept=kept.data_ptr(),
    )
    return kept
