"""Prediction of a whole image by a network that takes patches."""

import itertools
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional

NetworkProbabilities = Callable[[Tensor], Tensor]  # [n, 1, *patch] -> class probabilities [n, C, *patch]


def window_starts(side: int, patch: int, stride: int) -> list[int]:
    """First voxels, along one axis, of the windows that cover it: multiples of the stride, the last clipped.

    ceil((side - patch) / stride) + 1 windows, as UA-MT's evaluation on LA; `side` must be at least `patch`.
    """
    if not 1 <= stride <= patch:
        raise ValueError(f"stride is {stride}, accepted are 1 to the side of the patch, {patch}")
    windows = -(-(side - patch) // stride) + 1
    return [min(window * stride, side - patch) for window in range(windows)]


def _batches(items: Sequence, batch_size: int) -> Iterator[Sequence]:
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}, accepted are positive integers")
    for first in range(0, len(items), batch_size):
        yield items[first : first + batch_size]


@torch.no_grad()
def predict_volume(
    network_probabilities: NetworkProbabilities,
    image: Tensor,  # [*S], of any number of axes
    patch_size: Sequence[int],  # voxels
    stride: Sequence[int],  # voxels
    batch_size: int = 4,  # windows per call of the network
) -> Tensor:  # [C, *S] float32, on the device of the image
    """Class probabilities of an image: the mean over all windows that contain a voxel.

    An axis shorter than the patch is padded with zeros on both sides, and the result cropped back. Every
    window counts the same. The mode of the network (training, evaluation) and autocast are the caller's.
    ValueError if `patch_size` or `stride` has another number of axes than the image, or a stride leaves gaps.
    """
    if not image.ndim == len(patch_size) == len(stride):
        raise ValueError(
            f"patch_size {tuple(patch_size)} and stride {tuple(stride)}: accepted is one value per "
            f"axis of the image of shape {tuple(image.shape)}"
        )
    missing = [max(patch - side, 0) for side, patch in zip(image.shape, patch_size, strict=True)]
    before = [pad // 2 for pad in missing]
    padding = [(first, pad - first) for first, pad in zip(before, missing, strict=True)]
    padded = functional.pad(image, list(itertools.chain(*reversed(padding))))

    starts = [window_starts(*axis) for axis in zip(padded.shape, patch_size, stride, strict=True)]
    windows = [
        tuple(slice(first, first + patch) for first, patch in zip(corner, patch_size, strict=True))
        for corner in itertools.product(*starts)
    ]
    total: Tensor | None = None
    for batch in _batches(windows, batch_size):
        probabilities = network_probabilities(torch.stack([padded[window] for window in batch]).unsqueeze(1))
        if total is None:
            total = padded.new_zeros((probabilities.shape[1], *padded.shape), dtype=torch.float32)
        for window, window_probabilities in zip(batch, probabilities, strict=True):
            total[(slice(None), *window)] += window_probabilities
    assert total is not None  # there is at least one window

    count = padded.new_zeros(padded.shape, dtype=torch.float32)
    for window in windows:
        count[window] += 1
    total /= count
    inside = (slice(first, first + side) for first, side in zip(before, image.shape, strict=True))
    return total[(slice(None), *inside)]


@torch.no_grad()
def predict_slices(
    network_probabilities: NetworkProbabilities,
    image: Tensor,  # [slices, H, W]
    patch_size: Sequence[int],  # pixels, (H, W) of the network
    batch_size: int = 12,  # slices per call of the network
) -> Tensor:  # [slices, H, W] uint8, on the device of the image
    """Class of every pixel of a stack of slices, each resized to the patch and its class map resized back.

    The image is resized linearly, the class map to the nearest; both take pixels as areas (corners not
    aligned), so a slice of the patch's size passes unchanged. The mode of the network and autocast are the
    caller's. ValueError if the image is not a stack of slices.
    """
    if image.ndim != 3 or len(patch_size) != 2:
        raise ValueError(
            f"image has shape {tuple(image.shape)} and patch_size is {tuple(patch_size)}, accepted are "
            "[slices, H, W] and two sides"
        )
    classes = torch.empty(image.shape, dtype=torch.uint8, device=image.device)
    for batch in _batches(range(image.shape[0]), batch_size):
        part = slice(batch[0], batch[-1] + 1)
        patches = functional.interpolate(image[part].unsqueeze(1), tuple(patch_size), mode="bilinear")
        prediction = network_probabilities(patches).argmax(dim=1, keepdim=True).to(torch.uint8)
        classes[part] = functional.interpolate(prediction, image.shape[1:], mode="nearest-exact").squeeze(1)
    return classes
