"""Reference of the largest components: SciPy's labelling, on the CPU wherever the label map is."""

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

MOST_CLASSES = 256


def largest_components(
    label: Tensor,  # [B, *S] uint8
    num_classes: int,
) -> Tensor:  # [B, *S] uint8
    if label.is_meta:
        return label.new_empty(label.shape)
    kept = torch.zeros(label.shape, dtype=torch.uint8, device="cpu")
    for image, kept_of_image in zip(label.cpu().numpy(), kept.numpy(), strict=True):
        _keep_largest_components(image, kept_of_image, num_classes)
    return kept.to(label.device)


def _keep_largest_components(label: np.ndarray, kept: np.ndarray, num_classes: int) -> None:
    neighbours = np.ones((3,) * label.ndim)
    boxes = ndimage.find_objects(label, max_label=MOST_CLASSES - 1)
    for value, box in enumerate(boxes[: num_classes - 1], start=1):
        if box is None:
            continue
        components, count = ndimage.label(label[box] == value, neighbours)
        sizes = np.bincount(components.ravel(), minlength=count + 1)[1:]
        kept[box][components == sizes.argmax() + 1] = value
