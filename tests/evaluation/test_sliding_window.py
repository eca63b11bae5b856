"""Sliding window prediction against a loop over the windows written out."""

import itertools
import math
import subprocess
import sys

import numpy as np
import pytest
import torch

from semiseg.evaluation.sliding_window import slice_slabs, volume_slabs, window_starts


def probabilities_of(patches: torch.Tensor) -> torch.Tensor:
    """Something that depends on the place in the window, so that a wrong or missing window shows, and on every channel."""
    patches = sum(factor * channel for factor, channel in enumerate(patches.split(1, dim=1), start=1))
    position = sum(
        torch.linspace(-1, 1, side).reshape(-1, *[1] * axis) for axis, side in enumerate(patches.shape[:1:-1])
    )
    logits = torch.cat([patches * position, patches - position, position.expand_as(patches)], dim=1)
    return logits.softmax(dim=1)


def predict_volume(probabilities, image, patch, stride, batch_size: int = 4) -> torch.Tensor:  # [C, *S]
    """The slabs in one tensor, each copied, as it is valid only until the next."""
    slabs = volume_slabs(probabilities, image, patch, stride, batch_size)
    return torch.cat([slab.clone() for slab in slabs], dim=1)


def brute_force(image: np.ndarray, patch: tuple[int, ...], stride: tuple[int, ...]) -> np.ndarray:
    missing = [max(p - side, 0) for side, p in zip(image.shape[1:], patch, strict=True)]
    padded = np.pad(image, [(0, 0), *((pad // 2, pad - pad // 2) for pad in missing)])
    sides = padded.shape[1:]
    total, count = np.zeros((3, *sides)), np.zeros(sides)
    windows = [math.ceil((side - p) / s) + 1 for side, p, s in zip(sides, patch, stride, strict=True)]
    for index in itertools.product(*map(range, windows)):
        corner = [
            min(i * s, side - p) for i, s, side, p in zip(index, stride, sides, patch, strict=True)
        ]
        window = tuple(slice(c, c + p) for c, p in zip(corner, patch, strict=True))
        (probabilities,) = probabilities_of(torch.from_numpy(padded[(slice(None), *window)])[None]).numpy()
        total[(slice(None), *window)] += probabilities
        count[window] += 1
    crop = tuple(slice(pad // 2, pad // 2 + side) for pad, side in zip(missing, image.shape[1:], strict=True))
    return (total / count)[(slice(None), *crop)]


@pytest.mark.parametrize(
    "shape, patch, stride",
    [
        ((29, 23, 17), (16, 12, 8), (5, 7, 3)),
        ((16, 12, 8), (16, 12, 8), (4, 4, 4)),  # one window
        ((11, 23, 5), (16, 12, 8), (5, 6, 3)),  # smaller than the patch along two axes, by odd numbers
        ((3, 4, 5), (8, 8, 8), (1, 2, 3)),
        ((25, 31), (16, 8), (16, 8)),  # no overlap but at the end
        ((40,), (16,), (13,)),
    ],
)
@pytest.mark.parametrize("batch_size", [1, 4, 1000])
@pytest.mark.parametrize("channels", [1, 2])
def test_slabs_are_what_a_loop_over_the_windows_gives(shape, patch, stride, batch_size, channels):
    image = torch.randn(channels, *shape)
    probabilities = predict_volume(probabilities_of, image, patch, stride, batch_size)
    assert probabilities.dtype == torch.float32
    assert probabilities.shape == (3, *shape)
    torch.testing.assert_close(
        probabilities, torch.from_numpy(brute_force(image.numpy(), patch, stride)).float()
    )


def test_slabs_are_handed_out_once_no_window_reaches_them():
    """Windows start at planes 0, 3, 6 and 8 of 12."""
    image, calls = torch.randn(1, 12, 9), []

    def probabilities(patches):
        calls.append(len(patches))
        return probabilities_of(patches)

    seen = [
        (slab.shape[1], len(calls))
        for slab in volume_slabs(probabilities, image, (4, 6), (3, 3), batch_size=2)
    ]
    assert seen == [(3, 2), (3, 3), (2, 4), (4, 4)]  # planes, and how many rows of windows there had been


MEMORY = """
import resource
import torch
from semiseg.evaluation.sliding_window import volume_slabs

def probabilities(patches):
    return patches.expand(-1, 64, -1, -1, -1) / 64

image = torch.ones(1, 1200, 48, 48)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
planes = 0
for slab in volume_slabs(probabilities, image, (16, 16, 16), (12, 16, 16), batch_size=4):
    assert slab.shape[0] == 64
    planes += slab.shape[1]
assert planes == 1200
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


def test_memory_does_not_grow_with_the_first_axis():
    done = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True)
    whole = 64 * 1200 * 48 * 48 * 4  # bytes of every class of every voxel
    assert int(done.stdout) < whole / 8


@pytest.mark.parametrize(
    "side, patch, stride", [(183, 112, 18), (140, 112, 18), (88, 80, 4), (212, 112, 18), (80, 80, 4)]
)
def test_windows_of_the_left_atrium(side, patch, stride):
    starts = window_starts(side, patch, stride)
    assert len(starts) == math.ceil((side - patch) / stride) + 1
    assert starts == [min(i * stride, side - patch) for i in range(len(starts))]
    assert starts[0] == 0 and starts[-1] == side - patch
    assert len(set(starts)) == len(starts)


def test_no_more_windows_at_once_than_asked_for():
    sizes = []

    def probabilities(patches):
        sizes.append(len(patches))
        return probabilities_of(patches)

    predict_volume(probabilities, torch.randn(1, 20, 20), (8, 8), (4, 4), batch_size=3)
    assert sizes == [3] * 5 + [1]
    sizes.clear()
    assert len(list(slice_slabs(probabilities, torch.randn(1, 7, 20, 20), (8, 8), batch_size=3))) == 3
    assert sizes == [3, 3, 1]


def test_half_precision_probabilities_are_averaged_in_float32():
    image = torch.randn(1, 20, 24)
    half = predict_volume(lambda patches: probabilities_of(patches).bfloat16(), image, (8, 8), (1, 1), 16)
    full = predict_volume(probabilities_of, image, (8, 8), (1, 1), 16)
    assert half.dtype == torch.float32
    assert (half - full).abs().max() < 2**-8


def test_slices_of_the_patch_size_are_not_resized():
    image = torch.randn(2, 5, 24, 16)
    slabs = list(slice_slabs(probabilities_of, image, (24, 16), batch_size=2))
    assert [tuple(slab.shape) for slab in slabs] == [(3, 2, 24, 16), (3, 2, 24, 16), (3, 1, 24, 16)]
    torch.testing.assert_close(torch.cat(slabs, dim=1), probabilities_of(image.transpose(0, 1)).transpose(0, 1))


@pytest.mark.parametrize("shape, patch", [((30, 20), (64, 64)), ((50, 77), (32, 48))])
def test_slices_are_resized_there_and_back(shape, patch):
    # A disc stays the disc but for the pixels at its rim, in its own channel and slice and in no other.
    rows, columns = torch.meshgrid(*(torch.arange(side) for side in shape), indexing="ij")
    distance = ((rows - shape[0] / 2 + 0.5) ** 2 + (columns - shape[1] / 2 + 0.5) ** 2).sqrt()
    image = torch.stack([torch.randn(3, *shape), torch.zeros(3, *shape)])
    image[1, 1] = (distance < 8).float()
    seen = []

    def probabilities(patches):
        seen.append(tuple(patches.shape[2:]))
        return torch.stack([1 - patches[:, 1], patches[:, 1]], dim=1)

    classes = torch.cat(list(slice_slabs(probabilities, image, patch, batch_size=2)), dim=1).argmax(0)
    assert seen == [patch, patch]
    assert not classes[[0, 2]].any()
    assert (classes[1][distance < 6.5] == 1).all() and (classes[1][distance > 9.5] == 0).all()


def test_probabilities_come_back_from_the_pixel_at_the_same_place():
    """A pixel of three has its centre in the second, the fifth and the seventh of eight."""
    columns = torch.arange(8.0).expand(1, 1, 4, 8)
    (slab,) = slice_slabs(lambda patches: columns, torch.randn(1, 1, 4, 3), (4, 8), batch_size=1)
    assert slab.tolist() == [[[[1.0, 4.0, 6.0]] * 4]]


@pytest.mark.parametrize("slabs", [volume_slabs, slice_slabs])
def test_every_batch_is_reported_and_probabilities_are_float32_without_gradient(slabs):
    """Also those of a network in half precision whose weights are learned."""
    image, weight, reported = torch.randn(1, 5, 8, 8), torch.ones(1, requires_grad=True), []

    def progress(batches):
        for batch in batches:
            reported.append(len(batch))
            yield batch

    sizes = [(3, 8, 8), (2, 8, 8)] if slabs is volume_slabs else [(8, 8)]
    for slab in slabs(lambda patches: (weight * probabilities_of(patches)).bfloat16(), image, *sizes, 2, progress):
        assert slab.dtype == torch.float32 and not slab.requires_grad
    assert reported == ([2] if slabs is volume_slabs else [2, 2, 1])


def test_strides_batches_and_images_that_do_not_fit_are_refused():
    image = torch.randn(2, 9, 9)
    with pytest.raises(ValueError, match=r"stride \(2,\): accepted is one value per axis of the image of shape \(9, 9\)"):
        predict_volume(probabilities_of, image, (4, 4), (2,))
    with pytest.raises(ValueError, match="accepted is one value per axis"):
        predict_volume(probabilities_of, image, (2, 4, 4), (2, 4, 4))
    with pytest.raises(ValueError, match="stride is 0"):
        predict_volume(probabilities_of, image, (4, 4), (2, 0))
    with pytest.raises(ValueError, match="stride is 5"):  # would leave voxels out
        predict_volume(probabilities_of, image, (4, 4), (5, 4))
    with pytest.raises(ValueError, match="batch_size is 0"):
        predict_volume(probabilities_of, image, (4, 4), (2, 2), batch_size=0)
    with pytest.raises(ValueError, match="image has shape"):
        next(slice_slabs(probabilities_of, image, (4, 4), batch_size=1))
