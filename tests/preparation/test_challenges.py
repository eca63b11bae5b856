"""From the challenges' files to the plain layout: arithmetic, geometry, mirrored labels, lists."""

import itertools
import os
import shutil
import subprocess
import sys
import weakref
from dataclasses import replace
from pathlib import Path

import challenge_files as files
import numpy as np
import pytest
import torch
from challenge_preparation import (
    LEFT_ATRIUM_LABEL,
    PANCREAS_LABEL,
    SOURCES,
    everything,
    prepare,
    refusal,
    stored,
)
from untrained_runs import untrained_run

from semiseg import Predictor
from semiseg.data import open_dataset
from semiseg.preparation import CHALLENGES
from semiseg.preparation.dicom import read_dicom_series
from semiseg.preparation.volume import Volume, prepared_channels
from semiseg.preparation.volume_files import read_nifti, read_nrrd, read_volume

REAL_DATA = Path(os.environ.get("SEMISEG_DATA", ""))
VOLUMES = "2018LA_Seg_Training Set"


def mirror_stored_labels(name: str, source: Path, axis: int) -> None:
    """Mirror the voxels of every label file; the headers stay as they are."""
    for path in sorted(source.rglob("*")):
        if path.name == "laendo.nrrd":
            files.write_nrrd(path, np.flip(read_nrrd(path).values, axis))
        elif path.name.endswith("_gt.nii.gz") or path.name.startswith("label0"):
            label = read_nifti(path)
            files.write_nifti(path, np.flip(label.values, axis), label.affine)


def test_training_reads_what_was_prepared(challenge):
    name, source = challenge
    dataset = open_dataset(name, prepare(name, source))
    labelled, unlabelled = dataset.training_cases(1)
    assert labelled and unlabelled
    tests = list(dataset.evaluation_cases("test"))
    assert tests and not {case.name for case in tests} & {case.name for case in labelled + unlabelled}
    for case in (*labelled, *unlabelled, *tests):
        assert case.label.max() <= len(dataset.class_names) - 1
    assert any(case.label.max() == len(dataset.class_names) - 1 for case in labelled)


def test_left_atrium_arithmetic(left_atrium):
    dest = prepare("la", left_atrium)
    for number in range(5):
        raw = read_nrrd(left_atrium / f"CASE{number}" / "lgemri.nrrd").values.astype(np.float64)
        truth = read_nrrd(left_atrium / f"CASE{number}" / "laendo.nrrd").values == 255
        image, label = stored(dest / VOLUMES / f"CASE{number}" / "mri_norm2.h5")
        assert (image.dtype, label.dtype) == (np.float32, np.uint8)
        # A scan narrower than the patch is kept whole, and all its slices.
        np.testing.assert_allclose(image, (raw - raw.mean()) / raw.std(), rtol=1e-6, atol=1e-6)
        np.testing.assert_array_equal(label, truth)


def test_left_atrium_crop(tmp_path):
    """An atrium of 40 x 120 in the plane: 112 + 30 and 120 + 30 voxels around it, all slices."""
    raw = np.random.default_rng(0).normal(100, 5, (300, 260, 4)).astype(np.float32)
    label = np.zeros(raw.shape, np.uint8)
    label[110:150, 20:140, 1:3] = 255
    raw[label > 0] += 50
    for number in range(2):
        files.write_nrrd(tmp_path / "source" / str(number) / "lgemri.nrrd", raw, 0.625)
        files.write_nrrd(tmp_path / "source" / str(number) / "laendo.nrrd", label, 0.625)
    image, label = stored(prepare("la", tmp_path / "source") / VOLUMES / "0" / "mri_norm2.h5")
    assert image.shape == label.shape == (40 + 2 * (15 + 36), 120 + 2 * 15, 4)
    box = (slice(110 - 51, 150 + 51), slice(20 - 15, 140 + 15))
    np.testing.assert_allclose(image, ((raw - raw.mean()) / raw.std())[box], atol=1e-4)
    assert label[51:91, 15:135, 1:3].all() and label.sum() == 40 * 120 * 2


def test_acdc_arithmetic(acdc):
    """Frame 1 is the end-diastolic one, whichever number it had; slices lie as [y, x] and count from 1."""
    dest = prepare("acdc", acdc)
    frames = {1: (1, 12), 2: (11, 4), 3: (1, 12), 4: (11, 4)}
    found = 0
    for patient, phase in itertools.product(frames, (1, 2)):
        name = f"patient{patient:03d}"
        path = acdc / name / f"{name}_frame{frames[patient][phase - 1]:02d}.nii.gz"
        raw = read_nifti(path).values.astype(np.float64)
        truth = read_nifti(path.with_name(path.name.replace(".nii", "_gt.nii"))).values
        expected = (raw - raw.min()) / (raw.max() - raw.min())
        volume = dest / "data" / f"{name}_frame{phase:02d}.h5"
        if volume.is_file():
            image, label = stored(volume)
        else:
            slices = [dest / "data" / "slices" / f"{volume.stem}_slice_{k}.h5" for k in range(1, 9)]
            image, label = (np.stack(arrays) for arrays in zip(*map(stored, slices), strict=True))
        found += 1
        assert (image.dtype, label.dtype) == (np.float32, np.uint8)
        np.testing.assert_allclose(image, expected.transpose(2, 1, 0), atol=1e-6)
        np.testing.assert_array_equal(label, truth.transpose(2, 1, 0))
    assert found == 8 and len(list(dest.rglob("*.h5"))) == 4 + 4 * 8


def test_acdc_lists(acdc):
    dest = prepare("acdc", acdc)
    names = {stem: (dest / f"{stem}.list").read_text().split() for stem in ("train", "val", "test")}
    assert [len(listed) for listed in names.values()] == [4, 2, 2]
    assert len(set(itertools.chain.from_iterable(names.values()))) == 8
    slices = (dest / "train_slices.list").read_text().split()
    assert slices == [f"{name}_slice_{k}" for name in names["train"] for k in range(1, 9)]


def test_pancreas_arithmetic(pancreas):
    """Windowed, 1 mm, 25 mm around the pancreas, then zero mean and unit variance of the crop."""
    dest = prepare("pancreas", pancreas)
    truth = read_nifti(pancreas / PANCREAS_LABEL).values > 0
    image, label = stored(dest / "Pancreas_h5" / "image0002_norm.h5")
    assert (image.dtype, label.dtype) == (np.float32, np.uint8)
    assert image.mean() == pytest.approx(0, abs=1e-5) and image.std() == pytest.approx(1, abs=1e-5)
    assert label.sum() == pytest.approx(truth.sum() * 1.4 * 1.4 * 2, rel=0.05)  # mm³
    # Along x the pancreas lies more than 25 mm from the border on the left side only.
    there = np.flatnonzero(label.any((1, 2)))
    before = np.flatnonzero(truth.any((1, 2)))[0] * 1.4
    assert there[0] == pytest.approx(min(before, 25), abs=1) and image.shape[0] - 1 - there[-1] == 25
    # Air is cut off at -125, where the pancreas is at 75: 200 of the window's 400.
    hounsfield = read_dicom_series(pancreas / "DOI" / "PANCREAS_0002").turned("LPS").values
    assert hounsfield.min() == -900
    inside = np.median(image[label > 0]) - image.min()
    outside = np.median(image[(image > image.min() + 0.1) & (label == 0)]) - image.min()
    assert inside / outside == pytest.approx((75 + 125) / (40 + 125), rel=0.03)


def test_pancreas_intensities_of_a_whole_scan_are_those_of_the_training_crops(pancreas):
    """The same tissue has nearly the same value in a whole scan, prepared to be predicted, as in its crop."""
    dest = prepare("pancreas", pancreas)
    dataset = open_dataset("pancreas", dest)
    (name, *_) = (dest / "train.list").read_text().split()
    number = name.removeprefix("image")
    whole = read_dicom_series(pancreas / "DOI" / f"PANCREAS_{number}").turned("LPS")
    organ = read_nifti(pancreas / "labels" / f"label{number}.nii.gz").values > 0
    on_its_grid = replace(dataset.preprocessing, spacing=None)
    image, label = stored(dataset.path(name))
    assert np.median(prepared_channels([whole], on_its_grid)[0][organ]) == pytest.approx(
        np.median(image[label > 0]), abs=0.1
    )


def test_pancreas_intensities_are_scaled_by_the_training_crops_alone(pancreas):
    dest = prepare("pancreas", pancreas)
    (name,) = (dest / "test.list").read_text().split()
    description, before = (dest / "dataset.json").read_bytes(), stored(dest / "Pancreas_h5" / f"{name}_norm.h5")
    shutil.rmtree(dest)
    number = name.removeprefix("image")
    series = pancreas / "DOI" / f"PANCREAS_{number}" / "study" / "series"
    scan = read_dicom_series(series)
    organ = read_nifti(pancreas / "labels" / f"label{number}.nii.gz").values > 0
    files.write_dicom_series(series, np.where(organ, 2 * scan.values, scan.values), scan.spacing)
    prepare("pancreas", pancreas)
    assert not np.allclose(stored(dest / "Pancreas_h5" / f"{name}_norm.h5")[0], before[0])
    assert (dest / "dataset.json").read_bytes() == description


def test_pancreas_folders_of_others_say_nothing_of_whole_scans(pancreas):
    dest = prepare("pancreas", pancreas)
    (dest / "dataset.json").unlink()
    assert open_dataset("pancreas", dest).preprocessing.channels[0].kind == "standardise"


@pytest.mark.parametrize("orientation", ["RAS", "LAI", "SRP"])
def test_labels_along_other_axes_are_turned_by_their_headers(pancreas, capsys, orientation):
    expected = everything(prepare("pancreas", pancreas))
    shutil.rmtree(pancreas.parent / "dest")
    capsys.readouterr()
    path = pancreas / PANCREAS_LABEL
    turned = read_nifti(path).turned(orientation)
    files.write_nifti(path, turned.values, turned.affine)
    assert everything(prepare("pancreas", pancreas)) == expected
    note = "1 labels are stored along other axes than their images; their headers say how, so they are turned"
    assert f"{note}: image0002 ({orientation})" in capsys.readouterr().err


def test_a_label_without_an_origin_is_taken_by_index(pancreas, capsys):
    expected = everything(prepare("pancreas", pancreas))
    shutil.rmtree(pancreas.parent / "dest")
    capsys.readouterr()
    label = read_nifti(pancreas / PANCREAS_LABEL)
    files.write_nifti(label.path, label.values, np.diag(np.diag(label.affine)))
    assert everything(prepare("pancreas", pancreas)) == expected
    assert "1 headers place the label elsewhere than its image" in capsys.readouterr().err


@pytest.mark.parametrize("axis", range(3))
def test_mirrored_labels_are_named_and_the_remedy_works(challenge, capsys, axis):
    name, source = challenge
    expected = everything(prepare(name, source))
    shutil.rmtree(source.parent / "dest")
    capsys.readouterr()
    mirror_stored_labels(name, source, axis)
    message = refusal(capsys, name, source)
    count = len(CHALLENGES[name]().find(source))
    letter = "xyz"[axis]
    assert f"{count} of {count} labels lie mirrored" in message and f"({count} along {letter})" in message
    assert f"with --flip-labels {letter}," in message
    assert everything(prepare(name, source, "--flip-labels", letter)) == expected


def test_one_mirrored_label_among_good_ones_is_named(pancreas, capsys):
    label = read_nifti(pancreas / PANCREAS_LABEL)
    files.write_nifti(label.path, np.flip(label.values, (0, 1)), label.affine)
    message = refusal(capsys, "pancreas", pancreas)
    assert "1 of 3 labels" in message and "(1 along xy): image0002 fits" in message


def test_a_needless_flip_is_named(left_atrium, capsys):
    message = refusal(capsys, "la", left_atrium, "--flip-labels", "z")
    assert "5 of 5 labels" in message and "leave out --flip-labels" in message


def test_the_check_can_be_left_out(left_atrium):
    mirror_stored_labels("la", left_atrium, 0)
    dest = prepare("la", left_atrium, "--skip-flip-check")
    truth = read_nrrd(left_atrium / LEFT_ATRIUM_LABEL).values > 0
    np.testing.assert_array_equal(stored(dest / VOLUMES / "CASE1" / "mri_norm2.h5")[1], truth)


@pytest.mark.data
def test_real_left_atrium_rebuilt_from_a_raw_scan(tmp_path):
    """A scan whose whole has the mean and variance that its cropped, standardised HDF5 file tells of."""
    cases = list(itertools.islice(open_dataset("la", REAL_DATA / "LA").evaluation_cases("test"), 2))
    expected = {}
    for case in cases:
        image, label = (array[::2, ::2, ::2] for array in (case.image[0], case.label))
        shape = (200, 190, image.shape[2])
        inside = (slice(60, 60 + image.shape[0]), slice(70, 70 + image.shape[1]))
        outside = np.ones(shape, bool)
        outside[inside] = False
        # Two values outside the crop bring the whole to zero mean and unit variance.
        count, values = outside.sum(), image.astype(np.float64)
        mean = -values.sum() / count
        deviation = np.sqrt((outside.size - (values**2).sum()) / count - mean**2)
        raw = np.zeros(shape)
        raw[outside] = mean + deviation * np.where(np.arange(count) % 2, 1, -1)
        raw[inside] = image
        truth = np.zeros(shape, np.uint8)
        truth[inside] = label * np.uint8(255)
        folder = tmp_path / "source" / case.name
        files.write_nrrd(folder / "lgemri.nrrd", (raw * 21.5 + 40).astype(np.float32), 0.625)
        files.write_nrrd(folder / "laendo.nrrd", truth, 0.625)
        expected[case.name] = raw, truth > 0
    dest = prepare("la", tmp_path / "source")
    for case in cases:
        raw, truth = expected[case.name]
        image, label = stored(dest / VOLUMES / case.name / "mri_norm2.h5")
        start = [np.flatnonzero(truth.any(others))[0] - np.flatnonzero(label.any(others))[0]
                 for others in ((1, 2), (0, 2), (0, 1))]  # fmt: skip
        box = tuple(slice(s, s + n) for s, n in zip(start, image.shape, strict=True))
        np.testing.assert_array_equal(label, truth[box])
        np.testing.assert_allclose(image, raw[box], atol=1e-3)
        assert label.sum() == (case.label[::2, ::2, ::2] > 0).sum()
        assert min(image.shape[:2]) >= 112 and image.shape[2] == truth.shape[2]


@pytest.mark.data
def test_real_acdc_rebuilt_from_nifti(tmp_path):
    dataset = open_dataset("acdc", REAL_DATA / "ACDC")
    cases = list(itertools.islice(dataset.evaluation_cases("test"), 6))
    affine = files.LPS @ np.diag([1.5, 1.5, 10.0, 1.0])
    for diastole, systole in zip(cases[::2], cases[1::2], strict=True):
        patient = diastole.name.split("_")[0]
        for frame, case in ((1, diastole), (9, systole)):
            path = tmp_path / "source" / patient / f"{patient}_frame{frame:02d}.nii.gz"
            raw = np.rint(case.image[0].astype(np.float64) * 3000 + 17).astype(np.int16)
            files.write_nifti(path, raw.transpose(2, 1, 0), affine)
            files.write_nifti(
                path.with_name(f"{patient}_frame{frame:02d}_gt.nii.gz"), case.label.transpose(2, 1, 0), affine
            )
        (tmp_path / "source" / patient / "Info.cfg").write_text("ED: 1\nES: 9\n")
    lists = tmp_path / "lists"
    lists.mkdir()
    names = [case.name for case in cases]
    for list_name, chosen in (("train.list", names[:2]), ("val.list", names[2:4]), ("test.list", names[4:])):
        (lists / list_name).write_text("\n".join(chosen))
    dest = prepare("acdc", tmp_path / "source", "--lists", str(lists))
    for case in cases[2:]:
        image, label = stored(dest / "data" / f"{case.name}.h5")
        np.testing.assert_allclose(image, case.image[0], atol=0.5 / 3000 + 1e-6)
        np.testing.assert_array_equal(label, case.label)
    labelled, _ = open_dataset("acdc", dest).training_cases(1)
    slices = [
        (image, label) for case in cases[:2] for image, label in zip(case.image[0], case.label, strict=True)
    ]
    for case, (image, label) in zip(labelled, slices, strict=True):
        np.testing.assert_allclose(case.image[0], image, atol=0.5 / 3000 + 1e-6)
        np.testing.assert_array_equal(case.label, label)


def store_along(orientation: str, source: Path) -> None:
    """Store every scan along other axes; the headers say which."""
    for path in sorted(source.rglob("*.nii.gz")):
        turned = read_nifti(path).turned(orientation)
        files.write_nifti(path, turned.values, turned.affine)
    for path in sorted(source.rglob("*.nrrd")):
        turned = read_nrrd(path).turned(orientation)
        directions = turned.affine[:3, :3].T
        files.write_nrrd(path, turned.values, **{"space": "RAS", "space directions": directions})


def fed(run: Path, scan: Volume, monkeypatch) -> np.ndarray:
    """The volume that prediction gives to the network."""
    seen = []

    def noted(method, image, *_):
        seen.append(image)
        yield torch.zeros(method.num_classes, *image.shape[1:])

    monkeypatch.setattr("semiseg.prediction.probability_slabs", noted)
    Predictor(run).predict(scan, spacing=(0.625,) * 3 if scan.path.suffix == ".nrrd" else None)
    return seen[0]


@pytest.mark.filterwarnings("ignore:.*fewer than a patch")
@pytest.mark.parametrize("orientation", ["RAS", "LAS", "SPL", "IRA"])
@pytest.mark.parametrize("name", ["la", "acdc"])
def test_training_and_prediction_turn_a_scan_alike_whatever_its_axes(
    name, orientation, tmp_path, monkeypatch, capsys
):
    source = SOURCES[name](tmp_path / "source")
    expected = everything(prepare(name, source))
    shutil.rmtree(tmp_path / "dest")
    store_along(orientation, source)
    dest = prepare(name, source)
    assert everything(dest) == expected
    assert "along other axes than their images" not in capsys.readouterr().err
    dataset = open_dataset(name, dest)
    case = next(dataset.evaluation_cases("test"))
    run = untrained_run(tmp_path / "run", f"{name}_supervised", dataset.preprocessing, dataset.class_names)
    scan = next(scan for scan in CHALLENGES[name]().find(source) if scan.name == case.name)
    np.testing.assert_array_equal(fed(run, read_volume(scan.image), monkeypatch), case.image)


@pytest.mark.parametrize(("name", "which"), [("la", "CASE1"), ("acdc", "patient002")])
def test_one_scan_along_other_axes_than_the_others(name, which, tmp_path):
    source = SOURCES[name](tmp_path / "source")
    expected = everything(prepare(name, source))
    shutil.rmtree(tmp_path / "dest")
    store_along("RSA", source / which)
    assert everything(prepare(name, source)) == expected


def test_a_stack_across_an_oblique_axis_is_cut_along_its_slices(acdc, tmp_path, monkeypatch):
    """Short-axis slices whose normal leads to the left: training and prediction see them as they were acquired."""
    expected = everything(prepare("acdc", acdc))
    shutil.rmtree(tmp_path / "dest")
    acquired = np.eye(4)
    acquired[:3, :3] = np.array([[0, 0, -1], [-1, 0, 0], [0, -1, 0]]) @ np.diag([1.5, 1.5, 8.0])  # PIL
    for path in acdc.rglob("*.nii.gz"):
        turned = Volume(path, read_nifti(path).values, acquired).turned("PSL")
        files.write_nifti(path, turned.values, turned.affine)
    dest = prepare("acdc", acdc)
    assert everything(dest) == expected
    dataset = open_dataset("acdc", dest)
    run = untrained_run(tmp_path / "run", "acdc_supervised", dataset.preprocessing, dataset.class_names)
    case = next(dataset.evaluation_cases("test"))
    scan = next(scan for scan in CHALLENGES["acdc"]().find(acdc) if scan.name == case.name)
    np.testing.assert_array_equal(fed(run, read_nifti(scan.image), monkeypatch), case.image)


def test_a_label_of_another_series_by_name_is_not_needed(pancreas):
    """The collection holds labels of scans that were withdrawn from it."""
    shutil.copy(pancreas / PANCREAS_LABEL, pancreas / "labels" / "label0025.nii.gz")
    assert len(list(prepare("pancreas", pancreas).rglob("*.h5"))) == 3


def test_one_scan_is_in_memory_at_a_time(challenge, monkeypatch):
    name, source = challenge
    volumes = []
    read = CHALLENGES[name].read

    def recorded(challenge, scan):
        assert not any(volume() for volume in volumes)
        image, label = read(challenge, scan)
        volumes.extend((weakref.ref(image), weakref.ref(label)))
        return image, label

    monkeypatch.setattr(CHALLENGES[name], "read", recorded)
    prepare(name, source)
    assert len(volumes) == 2 * 2 * len(CHALLENGES[name]().find(source))  # checked, then written


def test_given_lists_decide(left_atrium, tmp_path, capsys):
    lists = tmp_path / "lists"
    lists.mkdir()
    (lists / "train.list").write_text("CASE3\nCASE0\n")
    (lists / "test.list").write_text("CASE4\n")
    dest = prepare("la", left_atrium, "--lists", str(lists))
    assert (dest / "train.list").read_text() == "CASE3\nCASE0\n"
    assert (dest / "test.list").read_text() == "CASE4\n"
    assert {path.name for path in (dest / VOLUMES).iterdir()} == {"CASE0", "CASE3", "CASE4"}
    assert "2 scans are in none of the lists and are left out: CASE1, CASE2" in capsys.readouterr().err


def test_the_command_says_what_it_did(left_atrium, tmp_path):
    command = [sys.executable, "-m", "semiseg.prepare", "la", str(left_atrium), str(tmp_path / "new" / "LA")]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0
    assert "4 in train.list, 1 in test.list (divided here, not the field's lists)" in result.stdout
    assert "writing: 100%" in result.stderr
