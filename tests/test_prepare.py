"""From the challenges' files to the plain layout: arithmetic, geometry, mirrored labels, refusals."""

import itertools
import os
import shutil
import subprocess
import sys
from pathlib import Path

import challenge_files as files
import h5py
import numpy as np
import pydicom
import pytest

from semiseg.data import open_dataset
from semiseg.preparation import CHALLENGES
from semiseg.preparation.volume_files import read_dicom_series, read_nifti, read_nrrd
from semiseg.prepare import main

SOURCES = {
    "la": files.left_atrium_source,
    "acdc": files.acdc_source,
    "pancreas": files.pancreas_source,
}
REAL_DATA = Path(os.environ.get("SEMISEG_DATA", ""))
LEFT_ATRIUM_LABEL, PANCREAS_LABEL = "CASE1/laendo.nrrd", "labels/label0002.nii.gz"
VOLUMES = "2018LA_Seg_Training Set"


@pytest.fixture(params=SOURCES)
def challenge(request, tmp_path) -> tuple[str, Path]:
    return request.param, SOURCES[request.param](tmp_path / "source")


@pytest.fixture
def left_atrium(tmp_path) -> Path:
    return files.left_atrium_source(tmp_path / "source")


@pytest.fixture
def acdc(tmp_path) -> Path:
    return files.acdc_source(tmp_path / "source")


@pytest.fixture
def pancreas(tmp_path) -> Path:
    return files.pancreas_source(tmp_path / "source")


def prepare(name: str, source: Path, *options: str) -> Path:
    dest = source.parent / "dest"
    main([name, str(source), str(dest), *options])
    return dest


def refusal(capsys: pytest.CaptureFixture, name: str, source: Path, *options: str) -> str:
    """The one line a refused preparation ends in; nothing may be left of it."""
    before = sorted(source.parent.iterdir())
    with pytest.raises(SystemExit) as stopped:
        prepare(name, source, *options)
    assert stopped.value.code == 2
    assert sorted(source.parent.iterdir()) == before
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    return lines[0]


def stored(path: Path) -> tuple[np.ndarray, np.ndarray]:
    with h5py.File(path) as file:
        return file["image"][()], file["label"][()]


def everything(folder: Path) -> dict[str, bytes]:
    """What the files of a prepared dataset hold, by their path."""
    contents = {}
    for path in folder.rglob("*"):
        if path.suffix == ".h5":
            image, label = stored(path)
            contents[str(path.relative_to(folder))] = image.tobytes() + label.tobytes()
        elif path.is_file():
            contents[str(path.relative_to(folder))] = path.read_bytes()
    return contents


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
        image, label = (array[::2, ::2, ::2] for array in (case.image, case.label))
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
            raw = np.rint(case.image.astype(np.float64) * 3000 + 17).astype(np.int16)
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
        np.testing.assert_allclose(image, case.image, atol=0.5 / 3000 + 1e-6)
        np.testing.assert_array_equal(label, case.label)
    labelled, _ = open_dataset("acdc", dest).training_cases(1)
    slices = [
        (image, label) for case in cases[:2] for image, label in zip(case.image, case.label, strict=True)
    ]
    for case, (image, label) in zip(labelled, slices, strict=True):
        np.testing.assert_allclose(case.image, image, atol=0.5 / 3000 + 1e-6)
        np.testing.assert_array_equal(case.label, label)


def rewrite_label(change):
    def damage(source: Path) -> None:
        label = read_nifti(source / PANCREAS_LABEL)
        files.write_nifti(label.path, *change(label.values, label.affine))

    return damage


def resliced(change):
    """Change or delete DICOM files of one patient, given from the lowest slice to the highest."""

    def damage(source: Path) -> None:
        folder = source / "DOI" / "PANCREAS_0002"
        slices = sorted((pydicom.dcmread(path) for path in folder.rglob("*.dcm")),
                        key=lambda slice: slice.ImagePositionPatient[2])  # fmt: skip
        change(slices)

    return damage


def delete(slices: list) -> None:
    Path(slices[7].filename).unlink()


def duplicate(slices: list) -> None:
    slices[7].save_as(Path(slices[7].filename).with_name("copy.dcm"))


def second_series(slices: list) -> None:
    slices[0].SeriesInstanceUID = pydicom.uid.generate_uid()
    slices[0].save_as(slices[0].filename)


def tilt(slices: list) -> None:
    for number, slice in enumerate(slices):
        slice.ImagePositionPatient[1] = float(slice.ImagePositionPatient[1]) + 0.5 * number
        slice.save_as(slice.filename)


def other_spacing(slices: list) -> None:
    slices[3].PixelSpacing = [1.2, 1.2]
    slices[3].save_as(slices[3].filename)


def without_position(slices: list) -> None:
    del slices[3].ImagePositionPatient
    slices[3].save_as(slices[3].filename)


def half_a_slice(slices: list) -> None:
    slices[3].PixelData = slices[3].PixelData[:100]
    slices[3].save_as(slices[3].filename)


def no_dicom(slices: list) -> None:
    Path(slices[3].filename).write_text("not DICOM")


def empty(source: Path) -> None:
    for path in source.iterdir():
        shutil.rmtree(path)


DAMAGES = {
    "no scans": (
        "pancreas",
        lambda source: shutil.rmtree(source / "DOI"),
        "no folder PANCREAS_NNNN below it",
    ),
    "no label": (
        "pancreas",
        lambda source: (source / PANCREAS_LABEL).unlink(),
        "no label0002.nii.gz below it",
    ),
    "slice missing": ("pancreas", resliced(delete), "slices lie 2.00 to 4.00 mm apart"),
    "slice twice": ("pancreas", resliced(duplicate), "slices lie 0.00 to 2.00 mm apart"),
    "two series": ("pancreas", resliced(second_series), "holds 2 DICOM series; expected one"),
    "tilted gantry": ("pancreas", resliced(tilt), "slices are shifted against each other"),
    "mixed spacing": ("pancreas", resliced(other_spacing), "PixelSpacing is"),
    "no position": ("pancreas", resliced(without_position), "has no ImagePositionPatient"),
    "half a slice": ("pancreas", resliced(half_a_slice), "cannot be decoded"),
    "no DICOM": ("pancreas", resliced(no_dicom), "cannot be read as DICOM"),
    "label shape": (
        "pancreas",
        rewrite_label(lambda v, a: (v[1:], a)),
        "the label has shape (43, 40, 20) and its",
    ),
    "label spacing": (
        "pancreas",
        rewrite_label(lambda v, a: (v, a @ np.diag([1, 1, 1.5, 1]))),
        "the label has spacing",
    ),
    "label oblique": (
        "pancreas",
        rewrite_label(
            lambda v, a: (
                v,
                np.array([[0.97, -0.243, 0, 0], [0.243, 0.97, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]) @ a,
            )
        ),
        "the label has directions",
    ),
    "label value": ("pancreas", rewrite_label(lambda v, a: (v * 3, a)), "holds the label 3; expected 0, 1"),
    "label empty": ("pancreas", rewrite_label(lambda v, a: (v * 0, a)), "labels no voxel"),
    "label of four axes": (
        "pancreas",
        rewrite_label(lambda v, a: (v[..., None].repeat(2, 3), a)),
        "expected three axes",
    ),
    "label truncated": (
        "pancreas",
        lambda source: (source / PANCREAS_LABEL).write_bytes((source / PANCREAS_LABEL).read_bytes()[:-200]),
        "cannot be read as NIfTI",
    ),
    "label twice": (
        "pancreas",
        lambda source: shutil.copy(source / PANCREAS_LABEL, source / "label0002.nii"),
        "is there twice",
    ),
    "no patients": ("acdc", empty, "no patientNNN folder"),
    "no Info.cfg": (
        "acdc",
        lambda source: (source / "patient002" / "Info.cfg").unlink(),
        "Info.cfg: missing",
    ),
    "no phase": (
        "acdc",
        lambda source: (source / "patient002" / "Info.cfg").write_text("ED: 11\nES: last\n"),
        "ES is 'last'; expected the number of a frame",
    ),
    "no frame": (
        "acdc",
        lambda source: (source / "patient002" / "patient002_frame04_gt.nii.gz").unlink(),
        "patient002_frame04_gt.nii.gz: missing; Info.cfg says ES is frame 4",
    ),
    "axes permuted": (
        "acdc",
        lambda source: [
            files.write_nifti(
                path, read_nifti(path).values.transpose(2, 1, 0), files.LPS @ np.diag([8.0, 1.5, 1.5, 1])
            )
            for path in (source / "patient003").glob("*.nii.gz")
        ],
        "spacing is (8.000, 1.500, 1.500) mm; expected the same along x and y",
    ),
    "two orientations": (
        "acdc",
        lambda source: [
            files.write_nifti(path, read_nifti(path).values, np.diag([1.5, 1.5, 8.0, 1]))
            for path in (source / "patient003").glob("*.nii.gz")
        ],
        "expected one orientation for the whole dataset",
    ),
    "no atria": ("la", empty, "no <id>/lgemri.nrrd"),
    "no atrium's label": ("la", lambda source: (source / LEFT_ATRIUM_LABEL).unlink(), "laendo.nrrd: missing"),
    "no NRRD": (
        "la",
        lambda source: (source / "CASE1" / "lgemri.nrrd").write_text("not NRRD"),
        "cannot be read as NRRD",
    ),
    "no direction": (
        "la",
        lambda source: files.write_nrrd(
            source / "CASE1" / "lgemri.nrrd",
            np.ones((60, 50, 12), np.float32),
            **{"space directions": np.diag([1.0, 1.0, np.nan])},
        ),
        "its header gives no direction for some axis",
    ),
    "atrium's spacing": (
        "la",
        lambda source: files.write_nrrd(
            source / "CASE1" / "lgemri.nrrd", read_nrrd(source / "CASE1" / "lgemri.nrrd").values, 2.0
        ),
        "expected 0.625 or 1.0 along every axis",
    ),
    "NaN": (
        "la",
        lambda source: files.write_nrrd(
            source / "CASE1" / "lgemri.nrrd", np.full((60, 50, 12), np.nan, np.float32)
        ),
        "holds NaN or infinity",
    ),
    "constant": (
        "la",
        lambda source: files.write_nrrd(source / "CASE1" / "lgemri.nrrd", np.ones((60, 50, 12), np.float32)),
        "holds 1.0 everywhere",
    ),
}


@pytest.mark.parametrize(("name", "damage", "message"), DAMAGES.values(), ids=DAMAGES)
def test_bad_input_ends_in_one_line_before_anything_is_written(name, damage, message, tmp_path, capsys):
    source = SOURCES[name](tmp_path / "source")
    damage(source)
    assert message in refusal(capsys, name, source)


def test_a_label_of_another_series_by_name_is_not_needed(pancreas):
    """The collection holds labels of scans that were withdrawn from it."""
    shutil.copy(pancreas / PANCREAS_LABEL, pancreas / "labels" / "label0025.nii.gz")
    assert len(list(prepare("pancreas", pancreas).rglob("*.h5"))) == 3


def test_an_existing_folder_is_not_touched(left_atrium, capsys):
    dest = prepare("la", left_atrium)
    before = everything(dest)
    assert "dest exists already; accepted is a new or an empty folder" in refusal(capsys, "la", left_atrium)
    assert everything(dest) == before


def test_an_empty_folder_is_taken(left_atrium):
    (left_atrium.parent / "dest").mkdir()
    assert len(list(prepare("la", left_atrium).rglob("*.h5"))) == 5


def test_an_interruption_leaves_nothing_behind(left_atrium, monkeypatch):
    written = []

    def interrupt(path, image, label):
        written.append(path)
        if len(written) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr("semiseg.preparation.left_atrium.write_case", interrupt)
    with pytest.raises(SystemExit) as stopped:
        prepare("la", left_atrium)
    assert stopped.value.code == 130
    assert len(written) == 3 and list(left_atrium.parent.iterdir()) == [left_atrium]


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


@pytest.mark.parametrize(("training", "test", "message"), [
    ("CASE0\nCASE9\n", "CASE1\n", "train.list: 'CASE9' is none of the 5 scans"),
    ("CASE0\n", "CASE1\nCASE0\n", "test.list: the patient of 'CASE0' is in train.list already"),
    ("CASE0\nCASE0\n", "CASE1\n", "train.list: names 'CASE0' more than once"),
    ("CASE0\n", "\n", "test.list: empty"),
])  # fmt: skip
def test_impossible_lists(left_atrium, tmp_path, capsys, training, test, message):
    lists = tmp_path / "lists"
    lists.mkdir()
    (lists / "train.list").write_text(training)
    (lists / "test.list").write_text(test)
    assert message in refusal(capsys, "la", left_atrium, "--lists", str(lists))


def test_too_few_patients(acdc, capsys):
    for number in (3, 4):
        shutil.rmtree(acdc / f"patient{number:03d}")
    assert "there are 2 patients; expected at least one for each of train.list" in refusal(
        capsys, "acdc", acdc
    )


@pytest.mark.parametrize("axes", ["w", "xx"])
def test_axes_that_are_none(left_atrium, capsys, axes):
    assert f"--flip-labels is {axes!r}; accepted are x, y, z" in refusal(
        capsys, "la", left_atrium, "--flip-labels", axes
    )


def test_the_command_says_what_it_did(left_atrium, tmp_path):
    command = [sys.executable, "-m", "semiseg.prepare", "la", str(left_atrium), str(tmp_path / "new" / "LA")]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0
    assert "4 in train.list, 1 in test.list (divided here, not the field's lists)" in result.stdout
    assert "writing: 100%" in result.stderr


def test_source_must_be_a_folder(tmp_path, capsys):
    (tmp_path / "here").mkdir()
    assert "source: no such folder" in refusal(capsys, "la", tmp_path / "here" / "source")
