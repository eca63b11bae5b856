"""HDF5 files whose image has one channel or several."""

import h5py
import numpy as np
import pytest
from h5_files import random_case, write_case

from semiseg.data.files import image_shape, read_case, read_cases_lazily, read_image_box, read_unlabelled_case

SHAPE = (5, 6, 7)


@pytest.mark.parametrize("channels", [1, 2, 3])
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int16])
def test_an_image_has_its_channels_first(tmp_path, channels, dtype):
    image, label = random_case(np.random.default_rng(channels), SHAPE, 3, channels)
    image = (9 * image).astype(dtype)
    path = tmp_path / "case.h5"
    write_case(path, image[0] if channels == 1 else image, label)
    expected = image.astype(np.float32)

    (lazily,) = read_cases_lazily(lambda name: path, ["a"], 3, 3, channels=channels)
    for case in (read_case(path, "a", 3, 3, channels=channels), lazily):
        np.testing.assert_array_equal(case.image, expected, strict=True)
        np.testing.assert_array_equal(case.label, label, strict=True)
    np.testing.assert_array_equal(read_unlabelled_case(path, "a", 3, channels).image, expected, strict=True)
    assert image_shape(path, 3, channels) == (channels, *SHAPE)
    box = slice(1, 4), slice(0, 6), slice(5, 6)
    np.testing.assert_array_equal(read_image_box(path, box, channels), expected[:, 1:4, :, 5:6], strict=True)


@pytest.mark.parametrize(("image", "label", "channels", "message"), [
    ((2, *SHAPE), SHAPE, 1, r"'image' has shape \(2, 5, 6, 7\) and 'label' \(5, 6, 7\); expected the same shape"),
    ((1, *SHAPE), SHAPE, 1, r"'image' has shape \(1, 5, 6, 7\) and 'label' \(5, 6, 7\); expected the same shape"),
    (SHAPE, SHAPE, 2,
     r"'image' has shape \(5, 6, 7\) and 'label' \(5, 6, 7\); expected 2 channels of the label's shape"),
    ((3, *SHAPE), SHAPE, 2, r"'image' has shape \(3, 5, 6, 7\) .* expected 2 channels of the label's shape"),
    ((2, 5, 6, 8), SHAPE, 2, r"'image' has shape \(2, 5, 6, 8\) .* expected 2 channels of the label's shape"),
    ((2, 6, 7), (6, 7), 2, r"'image' has shape \(2, 6, 7\); expected 2 channels of 3 axes, none of them empty"),
    ((2, 0, 6, 7), (0, 6, 7), 2, r"'image' has shape \(2, 0, 6, 7\); expected 2 channels of 3 axes"),
    ((2, *SHAPE), None, 1, r"'image' has shape \(2, 5, 6, 7\); expected 3 axes, none of them empty"),
    ((3, *SHAPE), None, 2, r"'image' has shape \(3, 5, 6, 7\); expected 2 channels of 3 axes"),
    ((2, 6, 7), None, 2, r"'image' has shape \(2, 6, 7\); expected 2 channels of 3 axes"),
    ((7, 6, 7), None, 2, r"'image' has shape \(7, 6, 7\); expected 2 channels of 3 axes"),
])  # fmt: skip
def test_other_channels_are_refused(tmp_path, image, label, channels, message):
    path = tmp_path / "case.h5"
    write_case(path, np.zeros(image, np.float32), None if label is None else np.zeros(label, np.uint8))
    readers = [
        lambda: read_case(path, "a", 3, 2, channels=channels),
        lambda: read_cases_lazily(lambda name: path, ["a"], 3, 2, channels=channels),
    ]
    if label is None:
        readers = [
            lambda: read_unlabelled_case(path, "a", 3, channels),
            lambda: image_shape(path, 3, channels),
            lambda: read_image_box(path, (slice(0, 1),) * 3, channels),
        ]
    for read in readers:
        with pytest.raises(ValueError, match=message) as raised:
            read()
        assert str(raised.value).startswith(f"{path}: ") and "\n" not in str(raised.value)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_no_channel_may_hold_nan_or_infinity(tmp_path, value):
    image, label = random_case(np.random.default_rng(0), SHAPE, 2, channels=2)
    image[1, 2, 3, 4] = value
    write_case(tmp_path / "case.h5", image, label)
    with pytest.raises(ValueError, match="'image' holds NaN or infinity"):
        read_case(tmp_path / "case.h5", "a", 3, 2, channels=2)
    box = slice(0, 2), slice(0, 6), slice(0, 7)
    assert np.isfinite(read_image_box(tmp_path / "case.h5", box, 2)).all()


def test_only_a_box_of_every_channel_is_read(tmp_path):
    with h5py.File(tmp_path / "large.h5", "w") as file:
        file.create_dataset("image", (3, 10**5, 10**5, 10**3), np.float32)  # 120 TB that take no place yet
    box = slice(99990, 99992), slice(5, 8), slice(7, 11)
    np.testing.assert_array_equal(
        read_image_box(tmp_path / "large.h5", box, 3), np.zeros((3, 2, 3, 4), np.float32), strict=True
    )
