"""Prediction of a whole image by a network that takes patches, without holding more of it than a few planes."""

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

NetworkProbabilities = Callable[[Tensor], Tensor]  # [n, M, *patch] -> class probabilities [n, C, *patch]
Progress = Callable[[Sequence[Any]], Iterable[Any]]  # hands the batches on, one after the other; tqdm is one


def window_starts(side: int, patch: int, stride: int) -> list[int]:
    """First voxels, along one axis, of the windows that cover it: multiples of the stride, the last clipped.

    ceil((side - patch) / stride) + 1 windows, as UA-MT's evaluation on LA; `side` must be at least `patch`.
    """
    if not 1 <= stride <= patch:
        raise ValueError(f"stride is {stride}, accepted are 1 to the side of the patch, {patch}")
    windows = -(-(side - patch) // stride) + 1
    return [min(window * stride, side - patch) for window in range(windows)]


def _batches(items: Sequence[Any] | Tensor, batch_size: int) -> list[Any]:
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}, accepted are positive integers")
    return [items[first : first + batch_size] for first in range(0, len(items), batch_size)]


def volume_slabs(
    network_probabilities: NetworkProbabilities,
    image: Tensor,  # [M, *S], S of any number of axes
    patch_size: Sequence[int],  # voxels
    stride: Sequence[int],  # voxels
    batch_size: int,  # windows per call of the network
    progress: Progress = iter,
) -> Iterator[Tensor]:  # [C, n, *S[1:]] float32, on the device of the image
    """Class probabilities of an image, slab by slab along S's first axis: the mean over all windows of a voxel.

    A slab is handed out as soon as no window to come reaches it, and is valid until the next is asked for; no
    more planes are held than a patch has. An axis shorter than the patch is padded with zeros on both sides,
    and the result cropped back. Every window counts the same. The mode of the network (training, evaluation)
    and autocast are the caller's. ValueError if `patch_size` or `stride` has another number of axes than S, or
    a stride leaves gaps.
    """
    if not image.ndim - 1 == len(patch_size) == len(stride):
        raise ValueError(
            f"patch_size {tuple(patch_size)} and stride {tuple(stride)}: accepted is one value per "
            f"axis of the image of shape {tuple(image.shape[1:])}"
        )
    padded, inside = _padded(image, patch_size)
    starts = [window_starts(*axis) for axis in zip(padded.shape[1:], patch_size, stride, strict=True)]
    means: _WindowMeans | None = None
    for batch in progress(_batches(list(itertools.product(*starts)), batch_size)):
        windows = [
            tuple(slice(first, first + side) for first, side in zip(corner, patch_size, strict=True))
            for corner in batch
        ]
        with torch.no_grad():
            probabilities = network_probabilities(torch.stack([padded[(slice(None), *window)] for window in windows]))
        if means is None:
            means = _WindowMeans(probabilities.shape[1], padded[0], patch_size, starts)
        for window, window_probabilities in zip(windows, probabilities, strict=True):
            finished = window[0].start - means.first_plane
            if finished > 0:
                yield means.finish(slice(0, finished))[(slice(None), slice(None), *inside[1:])]
                means.move(finished)
            means.add(window, window_probabilities)
    assert means is not None  # there is a window
    last = slice(inside[0].start, inside[0].start + min(image.shape[1], patch_size[0]))
    yield means.finish(last)[(slice(None), slice(None), *inside[1:])]


def _padded(
    image: Tensor,  # [M, *S]
    patch_size: Sequence[int],
) -> tuple[Tensor, tuple[slice, ...]]:
    """The image with zeros on both sides of an axis of S that is shorter than the patch, and where it then lies."""
    sides = image.shape[1:]
    missing = [max(patch - side, 0) for side, patch in zip(sides, patch_size, strict=True)]
    before = [pad // 2 for pad in missing]
    inside = tuple(slice(first, first + side) for first, side in zip(before, sides, strict=True))
    if not any(missing):
        return image, inside
    padding = [(first, pad - first) for first, pad in zip(before, missing, strict=True)]
    return functional.pad(image, list(itertools.chain(*reversed(padding)))), inside


class _WindowMeans:
    """Means over the windows of a voxel, for as many planes of the image as a patch has."""

    def __init__(
        self,
        num_classes: int,
        image: Tensor,  # [*S], one channel
        patch_size: Sequence[int],
        starts: Sequence[Sequence[int]],  # of the windows, along each axis
    ) -> None:
        self.first_plane = 0  # of the image, where the sums start
        self._depth = patch_size[0]
        shape = (num_classes, self._depth, *image.shape[1:])
        self._sums = image.new_zeros(shape, dtype=torch.float32)
        self._counts, *others = (
            _window_count(*axis).to(image.device) for axis in zip(image.shape, patch_size, starts, strict=True)
        )
        self._counts_in_plane = functools.reduce(
            lambda a, b: a.unsqueeze(-1) * b, others, torch.ones((), device=image.device)
        )

    def add(
        self,
        window: tuple[slice, ...],  # starts at the first plane
        probabilities: Tensor,  # [C, *patch_size]
    ) -> None:
        self._sums[(slice(None), slice(None), *window[1:])] += probabilities

    def finish(
        self,
        planes: slice,  # from the first plane on, which no window to come reaches
    ) -> Tensor:  # [C, n, *S[1:]], valid until the next call of any method
        slab = self._sums[:, planes]
        counts = self._counts[self.first_plane :][planes].reshape(-1, *[1] * self._counts_in_plane.ndim)
        slab /= counts * self._counts_in_plane
        return slab

    def move(
        self,
        planes: int,  # which are finished
    ) -> None:
        for plane in range(planes, self._depth):  # one by one, as the planes moved overlap where they go
            self._sums[:, plane - planes] = self._sums[:, plane]
        self._sums[:, self._depth - planes :] = 0
        self.first_plane += planes


def _window_count(
    side: int, patch: int, starts: Sequence[int]
) -> Tensor:  # [side] float32, windows that contain a voxel
    count = torch.zeros(side)
    for first in starts:
        count[first : first + patch] += 1
    return count


def slice_slabs(
    network_probabilities: NetworkProbabilities,
    image: Tensor,  # [M, slices, H, W]
    patch_size: Sequence[int],  # pixels, (H, W) of the network
    batch_size: int,  # slices per call of the network
    progress: Progress = iter,
) -> Iterator[Tensor]:  # [C, n, H, W] float32, on the device of the image
    """Class probabilities of a stack of slices, some slices at a time, each resized to the patch and back.

    The image is resized linearly, what comes back to the nearest, so that its arg max is the resized class
    map; both take pixels as areas (corners not aligned), so a slice of the patch's size passes unchanged. The
    mode of the network and autocast are the caller's. ValueError if the image is not a stack of slices.
    """
    if image.ndim != 4 or len(patch_size) != 2:
        raise ValueError(
            f"image has shape {tuple(image.shape)} and patch_size is {tuple(patch_size)}, accepted are "
            "[M, slices, H, W] and two sides"
        )
    for batch in progress(_batches(image.transpose(0, 1), batch_size)):
        patches = functional.interpolate(batch, tuple(patch_size), mode="bilinear")
        with torch.no_grad():
            probabilities = network_probabilities(patches).float()
        yield functional.interpolate(probabilities, image.shape[2:], mode="nearest-exact").transpose(0, 1)
