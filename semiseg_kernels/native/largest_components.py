import torch
from torch import Tensor

from semiseg_kernels.native.extension import launch


def forward(
    backend: str,
    label: Tensor,  # [B, *S] uint8
    num_classes: int,
) -> Tensor:  # [B, *S] uint8
    label = label.contiguous()
    kept = torch.empty_like(label)
    batch, *sides = label.shape
    Z, Y, X = [1] * (3 - len(sides)) + sides
    launch(
        backend,
        "largest_components",
        label.device,
        label=label.data_ptr(),
        B=batch,
        Z=Z,
        Y=Y,
        X=X,
        C=num_classes,
        kept=kept.data_ptr(),
    )
    return kept
