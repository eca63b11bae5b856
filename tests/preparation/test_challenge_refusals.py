"""Damaged challenges, impossible requests, interruptions: one line, and nothing left behind."""

import shutil
from pathlib import Path

import challenge_files as files
import numpy as np
import pydicom
import pytest
from challenge_preparation import LEFT_ATRIUM_LABEL, PANCREAS_LABEL, SOURCES, everything, prepare, refusal

from semiseg.preparation.volume_files import read_nifti, read_nrrd


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


def move_to(slice: pydicom.Dataset, height: float) -> None:
    slice.ImagePositionPatient[2] = height
    slice.save_as(slice.filename)


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
    "one place": (
        "pancreas",
        resliced(lambda slices: [move_to(slice, 6) for slice in slices]),
        "slices lie 0.00 to 0.00 mm apart",
    ),
    "two series": ("pancreas", resliced(second_series), "holds 2 DICOM series, "),
    "tilted gantry": ("pancreas", resliced(tilt), "slices are shifted against each other"),
    "mixed spacing": ("pancreas", resliced(other_spacing), "PixelSpacing is"),
    "no position": ("pancreas", resliced(without_position), "has no ImagePositionPatient"),
    "half a slice": ("pancreas", resliced(half_a_slice), "cannot be read as DICOM"),
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
        "holds 2 channels; expected one",
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
    "slices far apart": (
        "pancreas",
        resliced(lambda slices: [move_to(slice, 6 * number) for number, slice in enumerate(slices)]),
        "PANCREAS_0002: spacing is (1.4, 1.4, 6.0) mm; expected at most 5.0 along every axis",
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
    "no text": (
        "acdc",
        lambda source: (source / "patient002" / "Info.cfg").write_bytes(b"ED: 11\nES: \xb2\n"),
        "patient002/Info.cfg: ES is '\ufffd'; expected the number of a frame",
    ),
    "no frame": (
        "acdc",
        lambda source: (source / "patient002" / "patient002_frame04_gt.nii.gz").unlink(),
        "patient002_frame04_gt.nii.gz: missing; Info.cfg says ES is frame 4",
    ),
    "pixels not square": (
        "acdc",
        lambda source: [
            files.write_nifti(path, read_nifti(path).values, files.LPS @ np.diag([1.5, 3.0, 8.0, 1]))
            for path in (source / "patient003").glob("*.nii.gz")
        ],
        "spacing is (1.500, 3.000, 8.000) mm; expected the same along x and y",
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


def test_an_existing_folder_is_not_touched(left_atrium, capsys):
    dest = prepare("la", left_atrium)
    before = everything(dest)
    assert "dest exists already, accepted is a new or an empty folder" in refusal(capsys, "la", left_atrium)
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
    assert f"--flip-labels is {axes!r}, accepted are x, y, z" in refusal(
        capsys, "la", left_atrium, "--flip-labels", axes
    )


def test_source_must_be_a_folder(tmp_path, capsys):
    (tmp_path / "here").mkdir()
    assert "source: no such folder" in refusal(capsys, "la", tmp_path / "here" / "source")
