import numpy as np
import pytest
import torch

from semiseg.data import Augmentation, random_crop, random_rotate, random_rotate_flip, resize


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def numbered(shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """An image of distinct values from 1 and a label that is a function of it."""
    image = np.arange(1, np.prod(shape) + 1, dtype=np.float32).reshape(shape)
    return image, (image % 4).astype(np.uint8)


@pytest.mark.parametrize("patch", [(4, 5, 3), (9, 8, 7), (9, 2, 7)])
def test_crop_is_a_part_of_the_image_and_the_label_follows(patch):
    image, label = numbered((9, 8, 7))
    for seed in range(5):
        cropped, cropped_label = random_crop(image, label, patch, generator(seed))
        assert cropped.shape == cropped_label.shape == patch
        corner = np.argwhere(image == cropped[0, 0, 0])[0]
        box = tuple(slice(start, start + size) for start, size in zip(corner, patch, strict=True))
        np.testing.assert_array_equal(cropped, image[box])
        np.testing.assert_array_equal(cropped_label, label[box])


def test_crop_reaches_every_corner_equally_often():
    image, _ = numbered((5, 4))
    draws = generator()
    corners = [random_crop(image, None, (3, 3), draws)[0][0, 0] for _ in range(1200)]
    values, counts = np.unique(corners, return_counts=True)
    assert len(values) == 3 * 2
    assert counts.min() > 140  # 200 expected, standard deviation 13


def test_crop_pads_a_small_image_symmetrically():
    image, label = numbered((4, 9))
    cropped, cropped_label = random_crop(image, label, (7, 9), generator())
    np.testing.assert_array_equal(cropped, np.pad(image, ((1, 2), (0, 0))))
    np.testing.assert_array_equal(cropped_label, np.pad(label, ((1, 2), (0, 0))))


@pytest.mark.parametrize("shape", [(6, 6), (6, 5), (6, 5, 3)])
def test_rotate_flip_reaches_every_orientation_and_the_label_follows(shape):
    image, label = numbered(shape)
    expected = {np.flip(np.rot90(image, k), axis).tobytes() for k in range(4) for axis in range(2)}
    draws = generator()
    reached = set()
    for _ in range(200):
        turned, turned_label = random_rotate_flip(image, label, draws)
        np.testing.assert_array_equal(turned_label, turned % 4)
        reached.add(turned.tobytes())
    assert reached == expected


def test_rotate_turns_about_the_centre_by_up_to_20_degrees():
    height, width = 61, 91
    row, column = np.mgrid[:height, :width] - np.array([30.0, 45.0]).reshape(2, 1, 1)
    image = (np.hypot(row - 15, column) < 6).astype(np.float32)  # a disc straight below the centre
    label = image.astype(np.uint8)
    draws, angles = generator(), []
    for _ in range(200):
        turned, turned_label = random_rotate(image, label, draws)
        for rotated in (turned, turned_label):
            centre = np.array([(rotated * axis).sum() for axis in (row, column)]) / rotated.sum()
            assert np.hypot(*centre) == pytest.approx(15, abs=0.3)
            angle = np.degrees(np.arctan2(centre[1], centre[0]))
            assert abs(angle) <= 21
        angles.append(angle)
        assert set(np.unique(turned_label)) == {0, 1} and 0 <= turned.min() <= turned.max() <= 1.001
    assert min(angles) < -17 and max(angles) > 17 and abs(np.mean(angles)) < 3


def test_rotate_fills_with_zeros():
    image, label = np.ones((40, 30), np.float32), np.ones((40, 30), np.uint8)
    turned, turned_label = max(
        (random_rotate(image, label, generator(s)) for s in range(5)), key=lambda t: (t[0] == 0).sum()
    )
    assert turned[0, 0] == 0 or turned[0, -1] == 0
    assert turned_label.min() == 0 and turned[20, 15] == pytest.approx(1)


def test_resize_is_linear_for_images_and_nearest_for_labels():
    row, column = np.mgrid[:20, :30].astype(np.float32)
    image, label = 2 * row + column, (column >= 15).astype(np.uint8) * 3
    resized, resized_label = resize(image, label, (40, 45))
    expected = 2 * ((np.arange(40) + 0.5) / 2 - 0.5)[:, None] + ((np.arange(45) + 0.5) / 1.5 - 0.5)
    np.testing.assert_allclose(resized[2:-2, 2:-2], expected[2:-2, 2:-2], atol=1e-4)
    assert resized_label.dtype == np.uint8 and set(np.unique(resized_label)) == {0, 3}
    np.testing.assert_array_equal(resized_label[0], (np.arange(45) + 0.5 >= 22.5) * 3)


def test_resize_to_its_own_shape_changes_nothing():
    image, label = numbered((6, 7))
    resized, resized_label = resize(image, label, (6, 7))
    np.testing.assert_array_equal(resized, image)
    np.testing.assert_array_equal(resized_label, label)


@pytest.mark.parametrize(("name", "shape", "patch"), [
    ("crop", (9, 8, 7), (4, 9, 5)),
    ("crop_rotate_flip", (9, 8, 7), (4, 9, 5)),
    ("crop_rotate_flip", (9, 8), (12, 4)),
    ("rotate_flip_resize", (21, 18), (16, 20)),
])  # fmt: skip
def test_policies_return_the_patch_and_leave_the_case_alone(name, shape, patch):
    random = np.random.default_rng(0)
    image = random.standard_normal(shape).astype(np.float32)
    label = random.integers(0, 4, shape, dtype=np.uint8)
    image_before, label_before = image.copy(), label.copy()
    augmentation = Augmentation(name, patch)
    for seed in range(12):
        draws, again, without_label = generator(seed), generator(seed), generator(seed)
        out, out_label = augmentation(image, label, draws)
        assert out.shape == out_label.shape == patch
        assert (out.dtype, out_label.dtype) == (np.float32, np.uint8)
        np.testing.assert_array_equal(out, augmentation(image, label, again)[0])
        unlabelled, none = augmentation(image, None, without_label)
        np.testing.assert_array_equal(out, unlabelled)
        assert none is None
    np.testing.assert_array_equal(image, image_before)
    np.testing.assert_array_equal(label, label_before)


def test_slice_policy_frequencies():
    """1/2 rot90 + flip, 1/4 a small rotation, 1/4 nothing."""
    image, _ = numbered((12, 12))
    orientations = {np.flip(np.rot90(image, k), axis).tobytes() for k in range(4) for axis in range(2)}
    augmentation, draws = Augmentation("rotate_flip_resize", (12, 12)), generator()
    same = flipped = 0
    for _ in range(800):
        out = augmentation(image, None, draws)[0]
        same += out.tobytes() == image.tobytes()
        flipped += out.tobytes() in orientations and out.tobytes() != image.tobytes()
    # Of the 8 draws of rot90 and flip none is the identity: a flip always changes the handedness.
    assert abs(flipped - 400) < 60 and abs(same - 200) < 55


@pytest.mark.parametrize(("name", "patch", "message"), [
    ("mirror", (4, 4), "name is 'mirror'; accepted are crop, crop_rotate_flip, rotate_flip_resize"),
    ("rotate_flip_resize", (4, 4, 4), r"patch is \(4, 4, 4\); rotate_flip_resize accepts 2"),
    ("crop", (4, 0), r"patch is \(4, 0\)"),
    ("crop", (4,), r"patch is \(4,\); crop accepts 2 or 3"),
    ("crop", (), r"patch is \(\)"),
])  # fmt: skip
def test_what_is_refused(name, patch, message):
    with pytest.raises(ValueError, match=message):
        Augmentation(name, patch)


def test_an_image_of_other_axes_is_refused():
    image, label = numbered((4, 4))
    with pytest.raises(ValueError, match=r"image has shape \(4, 4\); a patch \(2, 2, 2\) needs 3 axes"):
        Augmentation("crop", (2, 2, 2))(image, label, generator())
