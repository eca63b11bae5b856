"""Scans of several channels: found by their names, read onto one grid, prepared channel by channel."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import h5py
import nibabel
import nifti_files as files
import numpy as np
import pytest
from challenge_files import write_dicom_series

from semiseg.data import open_dataset
from semiseg.data.preprocessing import Intensity
from semiseg.preparation.channel_files import grouped
from semiseg.preparation.meta_image import write_meta_image
from semiseg.preparation.scan_folders import find_scans
from semiseg.preparation.volume_files import (
    read_channel_headers,
    read_channels,
    read_header,
    read_nifti,
    read_volume,
)
from semiseg.prepare import main

Source = tuple[Path, Path]
CASES = [f"scan_{number}" for number in range(8)]


def second_channel(image: np.ndarray) -> np.ndarray:
    """Like the lungs' and bones' intensities of a CT, from another noise than the first's."""
    noise = np.random.default_rng(len(image)).normal(0, 20, image.shape)
    return np.where(image > 150, 100.0, -900.0) + noise


@pytest.fixture
def source(tmp_path) -> Source:
    """Two channels in a file each, `scan_0_0000.nii.gz` and `scan_0_0001.nii.gz`."""
    images, labels = files.own_source(tmp_path / "source")
    for path in sorted(images.iterdir()):
        case = path.name.removesuffix(".nii.gz")
        volume = read_nifti(path)
        files.write_image(images / f"{case}_0001.nii.gz", second_channel(volume.values), volume.affine)
        path.rename(images / f"{case}_0000.nii.gz")
    return images, labels


@pytest.fixture
def in_one_file(source) -> Source:
    """The same scans as NIfTI files of four axes."""
    images, labels = source[0].parent / "images_4d", source[1]
    images.mkdir()
    for case in CASES:
        channels = [read_nifti(source[0] / f"{case}_000{number}.nii.gz") for number in range(2)]
        values = np.stack([channel.values for channel in channels], axis=-1)
        nibabel.save(nibabel.Nifti1Image(values, channels[0].affine), images / f"{case}.nii.gz")
    return images, labels


def prepare(source: Source, *options: str, name: str = "dest") -> Path:
    dest = source[0].parent.parent / name
    main.__wrapped__(["own", *map(str, source), str(dest), *options])
    return dest


def stored_image(dest: Path, name: str) -> np.ndarray:
    with h5py.File(dest / "cases" / f"{name}.h5") as file:
        return file["image"][()]


def test_every_channel_is_scaled_on_its_own(source, capsys):
    dest = prepare(source)
    assert "modality: mr, ct (guessed" in capsys.readouterr().out
    mr, ct = open_dataset("own", dest).preprocessing.channels
    assert (mr.kind, ct.kind) == ("standardise", "fixed")
    for case in CASES:
        first, second = (read_nifti(source[0] / f"{case}_000{number}.nii.gz").values for number in range(2))
        expected = (first - first.mean()) / first.std(), (second.clip(*ct.clip) - ct.mean) / ct.deviation
        np.testing.assert_allclose(stored_image(dest, case), expected, rtol=1e-4, atol=1e-4)
    foreground = np.concatenate([
        read_nifti(source[0] / f"{case}_0001.nii.gz").values[read_nifti(source[1] / f"{case}.nii.gz").values > 0]
        for case in (dest / "train.list").read_text().split() if (source[1] / f"{case}.nii.gz").exists()
    ])  # fmt: skip
    low, high = np.percentile(foreground, [0.5, 99.5])
    assert ct.clip == pytest.approx((low, high), rel=0.01)


def test_channels_of_one_file_are_prepared_as_those_of_a_file_each(source, in_one_file):
    dest, other = prepare(source), prepare(in_one_file, name="other")
    assert open_dataset("own", dest).preprocessing == open_dataset("own", other).preprocessing
    for case in CASES:
        np.testing.assert_allclose(stored_image(dest, case), stored_image(other, case), rtol=1e-6)


def test_modality_of_all_channels_or_of_each(source):
    one = open_dataset("own", prepare(source, "--modality", "mr"))
    assert one.preprocessing.channels == (Intensity(), Intensity())
    each = open_dataset("own", prepare(source, "--modality", "ct", "mr", name="each"))
    assert [channel.kind for channel in each.preprocessing.channels] == ["fixed", "standardise"]
    with pytest.raises(ValueError, match="--modality is ct mr ct, accepted are one for all channels, or one for each of 2"):
        prepare(source, "--modality", "ct", "mr", "ct", name="wrong")


@pytest.mark.parametrize("options", [[], ["--slices"], ["--spacing", "2", "2", "5"]])
def test_all_channels_lie_as_their_label(source, options):
    """The second channel is the label itself: prepared, it is still where the label is."""
    for path in source[1].iterdir():
        shutil.copy(path, source[0] / path.name.replace(".nii", "_0001.nii"))
    dest = prepare(source, "--modality", "mr", *options)
    dataset = open_dataset("own", dest)
    for case in dataset.evaluation_cases("test"):
        for value in range(1, len(files.VALUES)):
            inside = stored_image(dest, case.name)[1][case.label == value]
            outside = stored_image(dest, case.name)[1][case.label == value - 1]
            assert np.median(inside) > np.median(outside)


def test_channels_are_turned_along_the_first(source):
    path = source[0] / "scan_0_0001.nii.gz"
    before = read_channels([source[0] / "scan_0_0000.nii.gz", path])
    turned = read_nifti(path).turned("ASL")
    nibabel.save(nibabel.Nifti1Image(turned.values, turned.affine), path)
    after = read_channels([source[0] / "scan_0_0000.nii.gz", path])
    assert after[1].orientation == before[1].orientation
    np.testing.assert_array_equal(after[1].values, before[1].values)
    np.testing.assert_array_equal(after[1].affine, after[0].affine)


def test_channels_of_other_grids_or_places_are_refused(source):
    path = source[0] / "scan_3_0001.nii.gz"
    volume = read_nifti(path)
    shifted, coarse = volume.affine.copy(), volume.affine.copy()
    shifted[:3, 3] += 30
    coarse[:3, :3] *= 2
    for values, affine, message in (
        (volume.values[:-1], volume.affine, r"the channel has shape \(39, 36, 16\)"),
        (volume.values, coarse, "the channel has spacing"),
        (volume.values, shifted, "the channel lies elsewhere than .*scan_3_0000"),
    ):
        files.write_image(path, values, affine)
        with pytest.raises(ValueError, match=f"scan_3_0001.*{message}"):
            prepare(source)
        assert not (source[0].parent.parent / "dest").exists()


def test_what_is_wrong_with_one_channel_names_its_file(source):
    path = source[0] / "scan_5_0001.nii.gz"
    volume = read_nifti(path)
    files.write_image(path, np.zeros_like(volume.values), volume.affine)
    with pytest.raises(ValueError, match="scan_5_0001.nii.gz: holds .* everywhere"):
        prepare(source)


def test_scans_that_lack_a_channel_are_refused(source):
    (source[0] / "scan_2_0001.nii.gz").unlink()
    with pytest.raises(ValueError, match=r"scan_2_0000.*channels of scan_2 are _0000; expected _0000, _0001 of every scan"):
        prepare(source)


def test_files_of_fewer_channels_are_refused(in_one_file):
    path = in_one_file[0] / "scan_4.nii.gz"
    first = read_channels([path])[0]
    files.write_image(path, first.values, first.affine)
    with pytest.raises(ValueError, match=r"scan_4.*the number of channels is 1, accepted is that of .*scan_0.*, 2"):
        prepare(in_one_file)


def test_numbers_that_labels_have_too_are_those_of_scans(source):
    """Four digits behind a name are a channel's only where labels are called without them."""
    images, labels = source
    for folder in source:
        for path in list(folder.iterdir()):
            case = path.name.removesuffix(".nii.gz")
            path.rename(folder / f"scan_{int(case.split('_')[1]):04d}{case[6:]}.nii.gz")
    labelled, unlabelled = find_scans(images, labels)
    assert [scan.name for scan in labelled] == [f"scan_000{number}" for number in range(6)]
    assert [path.name for path in unlabelled[-1].images] == ["scan_0007_0000.nii.gz", "scan_0007_0001.nii.gz"]
    for path in images.glob("*_0001.nii.gz"):
        path.unlink()
    for path in images.iterdir():
        path.rename(images / path.name.replace("_0000.nii", ".nii"))
    labelled, unlabelled = find_scans(images, labels)
    assert [scan.name for scan in (*labelled, *unlabelled)] == [f"scan_000{number}" for number in range(8)]


def test_swapped_folders_are_guessed(source):
    with pytest.raises(ValueError, match="for this label; are the folders swapped"):
        find_scans(source[1], source[0])


def test_labels_numbered_as_the_first_channel_are_told_of(source, capsys):
    for path in source[1].iterdir():
        path.rename(source[1] / path.name.replace(".nii", "_0000.nii"))
    _, unlabelled = find_scans(*source)
    assert "scan_0_0001" in [scan.name for scan in unlabelled]
    assert "note: 6 images count as scans without a label; of channels the label is called" in capsys.readouterr().err


def test_two_files_of_one_channel_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"a_0000.nrrd and a_0000.nii are both channel _0000"):
        grouped([tmp_path / "a_0000.nii", tmp_path / "a_0000.nrrd", tmp_path / "a_0001.nii"])


def test_an_image_under_two_names_is_one_patients_only_if_all_channels_are_the_same(source):
    for number in range(2):
        shutil.copy(source[0] / f"scan_0_000{number}.nii.gz", source[0] / f"scan_7_000{number}.nii.gz")
    shutil.copy(source[0] / "scan_1_0000.nii.gz", source[0] / "scan_6_0000.nii.gz")
    findings = (prepare(source) / "findings.md").read_text()
    assert "the same image: scan_0, scan_7" in findings and "scan_1, scan_6" not in findings


def test_series_of_dicom_are_channels_too(tmp_path):
    random = np.random.default_rng()
    values = random.integers(0, 500, (2, 9, 8, 5))
    for number, channel in enumerate(values):
        write_dicom_series(tmp_path / "images" / f"a_000{number}", channel, (1.0, 1.0, 2.0), intercept=0)
    folders = [tmp_path / "images" / f"a_000{number}" for number in range(2)]
    for channel, expected in zip(read_channels(folders), values, strict=True):
        np.testing.assert_array_equal(channel.values, expected)


@pytest.mark.parametrize("shape", [(5, 4, 3, 1, 2), (5, 4, 3, 2), (5, 4, 3, 2, 1)])
def test_channels_along_a_further_axis(shape, tmp_path):
    values = np.random.default_rng().normal(size=shape).astype(np.float32)
    nibabel.save(nibabel.Nifti1Image(values, np.diag([1.0, 2, 3, 1])), tmp_path / "a.nii.gz")
    for read in (read_channels, read_channel_headers):
        channels = read([tmp_path / "a.nii.gz"])
        assert [channel.values.shape for channel in channels] == [(5, 4, 3)] * 2
        np.testing.assert_array_equal(channels[1].spacing, (1, 2, 3))
    for number, channel in enumerate(read_channels([tmp_path / "a.nii.gz"])):
        np.testing.assert_array_equal(channel.values, values.reshape(5, 4, 3, 2)[..., number])
    for read in (read_volume, read_header, read_nifti):
        with pytest.raises(ValueError, match="a.nii.gz: holds 2 channels; expected one"):
            read(tmp_path / "a.nii.gz")


def test_two_further_axes_are_refused(tmp_path):
    nibabel.save(nibabel.Nifti1Image(np.ones((5, 4, 3, 2, 2)), np.eye(4)), tmp_path / "a.nii.gz")
    with pytest.raises(ValueError, match=r"a.nii.gz: has shape \(5, 4, 3, 2, 2\); expected three axes"):
        read_channels([tmp_path / "a.nii.gz"])


def test_a_description_of_one_channel_by_an_older_version(source, tmp_path):
    dest = prepare(source, "--modality", "ct", "mr")
    description = open_dataset("own", dest).preprocessing
    older = {"orientation": "RAS", "spacing": list(description.spacing), "intensity": "fixed",
             "clip": list(description.channels[0].clip), "mean": description.channels[0].mean,
             "deviation": description.channels[0].deviation}  # fmt: skip
    file = dest / "dataset.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"preprocessing": older}))
    assert open_dataset("own", dest).preprocessing == replace(description, channels=description.channels[:1])


def test_a_metaimage_is_read_as_its_nifti_file(in_one_file, tmp_path):
    """Labels and images, whose components are channels."""
    images, labels = tmp_path / "meta" / "images", tmp_path / "meta" / "labels"
    images.mkdir(parents=True)
    labels.mkdir()
    for case in CASES:
        volume = nibabel.load(in_one_file[0] / f"{case}.nii.gz")
        write_meta_image(images / f"{case}.mha", np.asarray(volume.dataobj, np.float32), volume.affine)
    for path in in_one_file[1].iterdir():
        label = read_nifti(path)
        write_meta_image(labels / path.name.replace(".nii.gz", ".mha"), np.asarray(label.values), label.affine)
    dest, other = prepare(in_one_file), prepare((images, labels), name="other")
    for case in CASES:
        np.testing.assert_allclose(stored_image(dest, case), stored_image(other, case), rtol=1e-5, atol=1e-5)
    assert (dest / "findings.md").read_text() == (other / "findings.md").read_text()


@pytest.mark.parametrize("read", [read_channels, read_channel_headers])
def test_a_metaimage_without_a_spacing_is_refused(read, tmp_path):
    path = tmp_path / "scan.mha"
    write_meta_image(path, np.ones((4, 3, 2), np.uint8), np.eye(4))
    path.write_bytes(path.read_bytes().replace(b"ElementSpacing = 1.0", b"ElementSpacing = 0.0"))
    with pytest.raises(ValueError, match="scan.mha: its header gives no direction for some axis"):
        read([path])
