from collections import Counter

import numpy as np
import pytest
import torch
from scipy import ndimage

from semiseg.data import Augmentation, resize
from semiseg.data.augmentation import Rotation, Stored, Turn
from semiseg.data.compact_image import CompactImage, compact


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def numbered(*shape: int) -> torch.Tensor:  # [1, *shape]
    """Distinct values from 1."""
    return torch.arange(1, np.prod(shape) + 1, dtype=torch.float32).reshape(1, *shape)


def patches(augmentation: Augmentation, case: list[Stored], draws: torch.Generator) -> list[torch.Tensor]:
    """What a batch gets of an image, and of a label behind it; voxels that are not written hold NaN or 255."""
    not_written = (float("nan"), torch.float32), (255, torch.uint8)
    patch = [
        torch.full((values.shape[0], *augmentation.patch), value, dtype=dtype)
        for values, (value, dtype) in zip(case, not_written, strict=False)
    ]
    augmentation.draw(case[0].shape[1:], draws)(case, patch)
    return patch


def integer(count: int, draws: torch.Generator) -> int:
    return int(torch.randint(count, (), generator=draws))


def rot90_and_flip(array: np.ndarray, quarters: int, axis: int) -> np.ndarray:
    return np.flip(np.rot90(array, quarters), axis)


def padded_crop(array: np.ndarray, patch: tuple[int, ...], corner: list[int]) -> np.ndarray:
    missing = [max(size - side, 0) for size, side in zip(patch, array.shape, strict=True)]
    padded = np.pad(array, [(count // 2, count - count // 2) for count in missing])
    return padded[tuple(slice(start, start + size) for start, size in zip(corner, patch, strict=True))]


def expected_crops(case: list[np.ndarray], name: str, patch: tuple[int, ...], draws: torch.Generator):
    """A crop as numpy does it: rotated, flipped, padded and cropped, whole array by whole array."""
    if name == "crop_rotate_flip":
        quarters, axis = integer(4, draws), integer(2, draws)
        case = [rot90_and_flip(array, quarters, axis) for array in case]
    if name == "crop_dihedral":
        order = (1, 0) if integer(2, draws) else (0, 1)
        flipped = [axis for axis in range(2) if integer(2, draws)]
        case = [np.flip(array.transpose(*order, *range(2, array.ndim)), flipped) for array in case]
    corner = [
        integer(max(side - size, 0) + 1, draws) for side, size in zip(case[0].shape, patch, strict=True)
    ]
    return [padded_crop(array, patch, corner) for array in case]


def expected_slices(case: list[np.ndarray], patch: tuple[int, int], draws: torch.Generator):
    """A turned, rotated or untouched slice at the size of the patch, by scipy's interpolation in float64."""
    if integer(2, draws):
        quarters, axis = integer(4, draws), integer(2, draws)
        case = [rot90_and_flip(array, quarters, axis) for array in case]
    elif integer(2, draws):
        angle = np.radians(20) * (2 * torch.rand((), generator=draws).item() - 1)
        centre = (np.array(case[0].shape).reshape(2, 1, 1) - 1) / 2
        row, column = np.indices(case[0].shape) - centre
        source = centre + [
            np.sin(angle) * column + np.cos(angle) * row,
            np.cos(angle) * column - np.sin(angle) * row,
        ]
        case = [interpolate(array, source, "grid-constant") for array in case]
    places = [
        (np.arange(size) + 0.5) * side / size - 0.5 for side, size in zip(case[0].shape, patch, strict=True)
    ]
    return [interpolate(array, np.stack(np.meshgrid(*places, indexing="ij")), "nearest") for array in case]


def interpolate(array: np.ndarray, places: np.ndarray, mode: str) -> np.ndarray:
    """Linear in images, nearest in labels."""
    if array.dtype == np.uint8:
        return ndimage.map_coordinates(array, np.rint(places), order=0, mode=mode)
    return ndimage.map_coordinates(array, places, order=1, mode=mode)


def random_case(*shape: int) -> list[torch.Tensor]:
    """An image of three channels and a label."""
    random = np.random.default_rng(0)
    image = random.standard_normal((3, *shape)).astype(np.float32)
    return [torch.from_numpy(image), torch.from_numpy(random.integers(0, 4, (1, *shape), dtype=np.uint8))]


def channels(case: list[torch.Tensor]) -> list[np.ndarray]:
    """Those of the image, and the label."""
    return [channel.numpy() for values in case for channel in values]


@pytest.mark.parametrize("name", ["crop", "crop_rotate_flip", "crop_dihedral"])
@pytest.mark.parametrize(("shape", "patch"), [
    ((9, 8, 7), (4, 5, 3)),  # inside
    ((9, 8, 7), (9, 8, 7)),  # of the same shape
    ((9, 6, 7), (4, 9, 10)),  # padded along some axes, which a quarter turn swaps
    ((4, 5, 3), (9, 8, 8)),  # padded along all
    ((9, 8), (4, 11)),
])  # fmt: skip
def test_crops_are_exactly_numpy_s(name, shape, patch):
    case = random_case(*shape)
    draws, again = generator(), generator()
    for _ in range(40):
        found = channels(patches(Augmentation(name, patch), case, draws))
        for array, expected in zip(found, expected_crops(channels(case), name, patch, again), strict=True):
            np.testing.assert_array_equal(array, expected, strict=True)
    assert torch.equal(draws.get_state(), again.get_state())


@pytest.mark.parametrize(("shape", "patch"), [
    ((21, 18), (16, 20)),
    ((21, 18), (32, 26)),
    ((18, 18), (18, 18)),
])  # fmt: skip
def test_slices_are_scipy_s(shape, patch):
    case = random_case(*shape)
    draws, again = generator(), generator()
    for _ in range(40):
        *found, found_label = channels(patches(Augmentation("rotate_flip_resize", patch), case, draws))
        *image, label = expected_slices(channels(case), patch, again)
        np.testing.assert_allclose(found, image, atol=2e-5)
        # A place just between two pixels may be rounded to either.
        assert found_label.dtype == np.uint8 and (found_label != label).sum() <= 1
    assert torch.equal(draws.get_state(), again.get_state())


def test_crop_reaches_every_corner_equally_often():
    draws, augmentation = generator(), Augmentation("crop", (3, 3))
    corners = [patches(augmentation, [numbered(5, 4)], draws)[0][0, 0, 0] for _ in range(1200)]
    values, counts = np.unique(corners, return_counts=True)
    assert len(values) == 3 * 2
    assert counts.min() > 140  # 200 expected, standard deviation 13


@pytest.mark.parametrize("shape", [(6, 6), (6, 5), (6, 5, 3)])
def test_turns_reach_every_orientation_and_the_label_follows(shape):
    image = numbered(*shape)
    expected = {rot90_and_flip(image[0].numpy(), k, axis).tobytes() for k in range(4) for axis in range(2)}
    draws = generator()
    reached = set()
    for _ in range(200):
        turn = Turn.draw(draws)
        turned, turned_label = turn([image, image % 4])
        assert turned.shape == (1, *turn.shape(shape))
        torch.testing.assert_close(turned_label, turned % 4, rtol=0, atol=0)
        reached.add(turned.numpy().tobytes())
    assert reached == expected


def test_a_scan_is_also_trained_on_as_it_is():
    """All eight symmetries of a square equally often; the other crop with turns knows only its four mirror images."""
    image, draws = numbered(6, 6, 3), generator()
    poses = {np.flip(np.rot90(image[0].numpy(), k), [0][:flip]).tobytes() for k in range(4) for flip in range(2)}
    augmentation = Augmentation("crop_dihedral", (6, 6, 3))
    drawn = Counter(patches(augmentation, [image], draws)[0].numpy().tobytes() for _ in range(1600))
    assert drawn.keys() == poses and image.numpy().tobytes() in poses
    assert min(drawn.values()) > 150  # 200 expected, standard deviation 13


def test_rotation_turns_about_the_centre_by_up_to_20_degrees():
    height, width = 61, 91
    row, column = np.mgrid[:height, :width] - np.array([30.0, 45.0]).reshape(2, 1, 1)
    image = torch.from_numpy(np.hypot(row - 15, column) < 6).float()  # a disc straight below the centre
    draws, angles = generator(), []
    for _ in range(200):
        turned = channels(Rotation.draw(draws)([image[None], image[None].byte()]))
        for rotated in turned:
            centre = np.array([(rotated * axis).sum() for axis in (row, column)]) / rotated.sum()
            assert np.hypot(*centre) == pytest.approx(15, abs=0.3)
            angle = np.degrees(np.arctan2(centre[1], centre[0]))
            assert abs(angle) <= 21
        angles.append(angle)
        assert set(np.unique(turned[1])) == {0, 1} and 0 <= turned[0].min() <= turned[0].max() <= 1.001
    assert min(angles) < -17 and max(angles) > 17 and abs(np.mean(angles)) < 3


def test_resize_is_linear_for_images_and_nearest_for_labels():
    row, column = np.mgrid[:20, :30].astype(np.float32)
    resized, negative = resize(torch.from_numpy(np.stack([2 * row + column, -2 * row - column])), (40, 45))
    (resized_label,) = resize(torch.from_numpy((column[np.newaxis] >= 15).astype(np.uint8) * 3), (40, 45))
    expected = 2 * ((np.arange(40) + 0.5) / 2 - 0.5)[:, None] + ((np.arange(45) + 0.5) / 1.5 - 0.5)
    np.testing.assert_allclose(resized[2:-2, 2:-2], expected[2:-2, 2:-2], atol=1e-4)
    assert torch.equal(negative, -resized)
    assert resized_label.dtype == torch.uint8 and set(resized_label.unique().tolist()) == {0, 3}
    np.testing.assert_array_equal(resized_label[0], (np.arange(45) + 0.5 >= 22.5) * 3)


def test_resize_to_its_own_shape_changes_nothing():
    image = numbered(6, 7)
    assert resize(image, (6, 7)) is image


every_augmentation = pytest.mark.parametrize(("name", "shape", "patch"), [
    ("crop", (9, 8, 7), (4, 9, 5)),
    ("crop_rotate_flip", (9, 8, 7), (4, 9, 5)),
    ("crop_dihedral", (9, 8, 7), (4, 9, 5)),
    ("rotate_flip_resize", (21, 18), (16, 20)),
])  # fmt: skip


@every_augmentation
@pytest.mark.parametrize("is_compact", [False, True])
def test_every_channel_is_transformed_as_it_is_alone(name, shape, patch, is_compact):
    shape, augmentation = tuple(4 * side for side in shape), Augmentation(name, tuple(4 * side for side in patch))
    image = random_case(*shape)[0]
    if is_compact:
        image = (50 * image.abs()).round().clamp(max=200) / torch.tensor([3, 5, 7]).view(3, *[1] * len(shape))
    stored = compact(image.numpy())
    assert isinstance(stored, CompactImage) == is_compact
    for seed in range(12):
        (found,) = patches(augmentation, [stored], generator(seed))
        expected = torch.cat([patches(augmentation, [channel], generator(seed))[0] for channel in image.split(1)])
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)  # of several, a rotation rounds otherwise
        assert not torch.equal(found[0], found[1])


@every_augmentation
def test_a_case_is_left_alone_and_its_image_needs_no_label(name, shape, patch):
    case = random_case(*shape)
    before = [values.clone() for values in case]
    augmentation = Augmentation(name, patch)
    for seed in range(12):
        image, _ = patches(augmentation, case, generator(seed))
        torch.testing.assert_close(patches(augmentation, case[:1], generator(seed)), [image], rtol=0, atol=0)
    torch.testing.assert_close(case, before, rtol=0, atol=0)


def test_slice_policy_frequencies():
    """1/2 rot90 + flip, 1/4 a small rotation, 1/4 nothing."""
    image = numbered(12, 12)
    orientations = {rot90_and_flip(image[0].numpy(), k, axis).tobytes() for k in range(4) for axis in range(2)}
    augmentation, draws = Augmentation("rotate_flip_resize", (12, 12)), generator()
    same = flipped = 0
    for _ in range(800):
        out = patches(augmentation, [image], draws)[0]
        same += torch.equal(out, image)
        flipped += out.numpy().tobytes() in orientations and not torch.equal(out, image)
    # Of the 8 draws of rot90 and flip none is the identity: a flip always changes the handedness.
    assert abs(flipped - 400) < 60 and abs(same - 200) < 55


@pytest.mark.parametrize(("name", "patch", "message"), [
    ("mirror", (4, 4),
     "dataset.augmentation is 'mirror', accepted are crop, crop_dihedral, crop_rotate_flip, rotate_flip_resize"),
    ("rotate_flip_resize", (4, 4, 4), r"patch is \(4, 4, 4\), accepted with rotate_flip_resize are 2"),
    ("crop", (4, 0), r"patch is \(4, 0\)"),
    ("crop", (4,), r"patch is \(4,\), accepted with crop are 2 or 3"),
    ("crop", (), r"patch is \(\)"),
])  # fmt: skip
def test_what_is_refused(name, patch, message):
    with pytest.raises(ValueError, match=message):
        Augmentation(name, patch)


def test_an_image_of_other_axes_is_refused():
    with pytest.raises(ValueError, match=r"shape is \(4, 4\), accepted with the patch \(2, 2, 2\) are 3 axes"):
        Augmentation("crop", (2, 2, 2)).draw((4, 4), generator())
