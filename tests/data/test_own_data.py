"""Own data with images of one channel and of several: volumes, slices, and what they take of the memory."""

import h5py
import numpy as np
import pytest
from h5_files import write_own

from semiseg.data import open_dataset
from semiseg.data import own as own_data
from semiseg.data.disk_image import DiskImage

LABELLED, UNLABELLED = ("first", "second"), ("unlabelled", "another")


def stored(root, name) -> tuple[np.ndarray, np.ndarray | None]:  # [M, *S], [*S]
    with h5py.File(root / "cases" / f"{name}.h5") as file:
        image = file["image"][()]
        return image if image.ndim == 4 else image[np.newaxis], file["label"][()] if "label" in file else None


@pytest.mark.parametrize("channels", [1, 2, 3])
def test_volumes(tmp_path, channels):
    root = write_own(tmp_path, 3, channels)
    dataset = open_dataset("own", root)
    labelled, unlabelled = dataset.training_cases(2)
    cases = [*labelled, *unlabelled, *dataset.evaluation_cases("validation"), *dataset.evaluation_cases("test")]
    assert [case.name for case in cases] == [*LABELLED, *UNLABELLED, "validation", "test"]
    for case in cases:
        image, label = stored(root, case.name)
        assert len(image) == channels
        np.testing.assert_array_equal(case.image, image, strict=True)
        if label is not None:
            np.testing.assert_array_equal(case.label, label, strict=True)


@pytest.mark.parametrize("channels", [1, 2, 3])
@pytest.mark.parametrize("on_disk", [False, True])
def test_slices(tmp_path, monkeypatch, channels, on_disk):
    root = write_own(tmp_path, 2, channels)
    if on_disk:
        voxels = sum(stored(root, name)[1].size for name in LABELLED)
        monkeypatch.setattr(own_data, "available_memory", lambda: 2 * (4 * channels + 1) * voxels)
    labelled, unlabelled = open_dataset("own", root).training_cases(2)
    assert all(isinstance(case.image, DiskImage) == on_disk for case in unlabelled)
    for cases, names in ((labelled, LABELLED), (unlabelled, UNLABELLED)):
        expected = [(f"{name}#{number}", image) for name in names
                    for number, image in enumerate(stored(root, name)[0].swapaxes(0, 1), start=1)]  # fmt: skip
        assert [case.name for case in cases] == [name for name, _ in expected]
        for case, (_, image) in zip(cases, expected, strict=True):
            given = case.image.expand().numpy() if isinstance(case.image, DiskImage) else case.image
            np.testing.assert_array_equal(given, image, strict=True)
    labels = [label for name in LABELLED for label in stored(root, name)[1]]
    for case, label in zip(labelled, labels, strict=True):
        np.testing.assert_array_equal(case.label, label, strict=True)


@pytest.mark.parametrize("channels", [1, 2, 3])
def test_memory_is_counted_in_channels(tmp_path, monkeypatch, channels):
    root = write_own(tmp_path, 3, channels)
    dataset = open_dataset("own", root)
    voxels = {name: stored(root, name)[0][0].size for name in (*LABELLED, *UNLABELLED)}
    with_label = sum((4 * channels + 1) * voxels[name] for name in LABELLED)
    everything = with_label + sum(4 * channels * voxels[name] for name in UNLABELLED)
    for available, on_disk in ((2 * everything, False), (2 * everything - 1, True), (2 * with_label, True)):
        monkeypatch.setattr(own_data, "available_memory", lambda available=available: available)
        assert [isinstance(case.image, DiskImage) for case in dataset.training_cases(2)[1]] == [on_disk] * 2
    monkeypatch.setattr(own_data, "available_memory", lambda: 2 * with_label - 1)
    with pytest.raises(ValueError, match="dataset.labelled is 2, cases of .* GB, accepted are as many as take up to"):
        dataset.training_cases(2)
