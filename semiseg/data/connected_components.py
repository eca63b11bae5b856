"""Largest connected component per class."""

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor


def largest_components(
    label: Tensor,  # [B, *S] uint8
    num_classes: int,
) -> Tensor:  # [B, *S] uint8, on the same device
    """Keep the largest connected component of every foreground class; all else becomes background.

    Neighbours touch by a face, an edge or a corner (26 in 3D, 8 in 2D). Of components of one size the first
    in scan order stays. The work is done on the CPU.
    """
    kept = np.stack([_largest_components(one, num_classes) for one in label.cpu().numpy()])
    return torch.from_numpy(kept).to(label.device)


def _largest_components(label: np.ndarray, num_classes: int) -> np.ndarray:
    kept = np.zeros_like(label)
    neighbours = np.ones((3,) * label.ndim)
    for value, box in enumerate(ndimage.find_objects(label, max_label=num_classes - 1), start=1):
        if box is None:
            continue
        components, count = ndimage.label(label[box] == value, neighbours)
        sizes = np.bincount(components.ravel(), minlength=count + 1)[1:]
        kept[box][components == sizes.argmax() + 1] = value
    return kept
