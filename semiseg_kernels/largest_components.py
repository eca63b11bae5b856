"""Largest components: of every class the largest connected component."""

import torch
from torch import Tensor

from . import backends, checks, reference


def largest_components(
    label: Tensor,  # [B, *S]
    num_classes: int,
) -> Tensor:  # [B, *S]
    """Keep every image's largest connected component of each foreground class; all else becomes background.

    label: uint8; 0 is background, and so are values >= num_classes. *S are 1 to 3 axes of fewer than 2^31
        voxels.
    num_classes: 1..256, the background among them.

    Neighbours touch by a face, an edge or a corner (26 in 3D, 8 in 2D). Of components of one size the first
    in scan order stays. Returns a new tensor, uint8 and contiguous. Not differentiable. Raises ValueError on
    wrong shapes, dtypes or numbers of classes.
    """
    checks.check_label_map("label", label)
    if not 1 <= num_classes <= 256:
        raise ValueError(f"num_classes is {num_classes}, accepted are 1..256")
    backend = backends.select("largest_components", label, num_classes, 1, 1)
    if backend == "reference":
        return reference.largest_components(label, num_classes)
    return torch.ops.semiseg_kernels.largest_components_forward(label, num_classes, backend)


def _fake_forward(label: Tensor, num_classes: int, backend: str) -> Tensor:
    return label.new_empty(label.shape)


backends.register(
    "largest_components_forward(Tensor label, int num_classes, str backend) -> Tensor", _fake_forward
)
