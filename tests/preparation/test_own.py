"""From folders of images and labels to the plain layout and configurations: geometry, choices, findings, refusals."""

import json
import os
import re
import shutil
import socket
import unicodedata
from pathlib import Path

import challenge_files as challenges
import h5py
import nibabel
import nifti_files as files
import numpy as np
import pytest
import yaml
from scipy.spatial.transform import Rotation

from semiseg.config import load_config
from semiseg.data import UnlabelledCase, open_dataset
from semiseg.engine.trainer import train
from semiseg.evaluate import evaluate
from semiseg.preparation.checks import LabelPlacement
from semiseg.preparation.volume_files import read_nifti
from semiseg.prepare import main

Source = tuple[Path, Path]


@pytest.fixture
def source(tmp_path) -> Source:
    return files.own_source(tmp_path / "source")


def prepare(source: Source, *options: str, name: str = "dest") -> Path:
    dest = source[0].parent.parent / name
    main(["own", *map(str, source), str(dest), *options])
    return dest


def refusal(capsys: pytest.CaptureFixture, source: Source, *options: str) -> str:
    """The one line a refused preparation ends in; nothing may be left of it."""
    before = sorted(source[0].parent.parent.iterdir())
    with pytest.raises(SystemExit) as stopped:
        prepare(source, *options)
    assert stopped.value.code == 2
    assert sorted(source[0].parent.parent.iterdir()) == before
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    return lines[0]


def stored(dest: Path, name: str) -> tuple[np.ndarray, np.ndarray | None]:
    with h5py.File(dest / "cases" / f"{name}.h5") as file:
        return file["image"][()], file["label"][()] if "label" in file else None


def names(dest: Path, list_name: str) -> list[str]:
    return (dest / f"{list_name}.list").read_text().split()


def rewrite(path: Path, change) -> None:
    """Change a file's values."""
    volume = read_nifti(path)
    writer = files.write_label if path.parent.name == "labels" else files.write_image
    writer(path, change(np.array(volume.values)), volume.affine)


def poison(path: Path) -> None:
    volume = read_nifti(path)
    values = np.array(volume.values, np.float32)
    values[3, 4, 5] = np.nan
    nibabel.save(nibabel.Nifti1Image(values, volume.affine), path)


def standardised(path: Path) -> np.ndarray:
    values = np.asarray(read_nifti(path).values, np.float64)
    return (values - values.mean()) / values.std()


def test_layout_and_description(source, capsys):
    dest = prepare(source, "--classes", "liver", "left kidney", "spleen")
    assert {path.name for path in dest.iterdir()} == {
        "cases", "train.list", "test.list", "dataset.json", "findings.md",
        "supervised.yaml", "mper.yaml", "vclipseg.yaml",
    }  # fmt: skip
    training, test = names(dest, "train"), names(dest, "test")
    assert sorted(training + test) == [f"scan_{number}" for number in range(8)]
    assert len(test) == 1 and training[-2:] == ["scan_6", "scan_7"]
    for number in range(8):
        image, label = stored(dest, f"scan_{number}")
        assert image.dtype == np.float32 and (label is None) == (number >= 6)
        np.testing.assert_allclose(
            image, standardised(source[0] / f"scan_{number}.nii.gz"), rtol=1e-5, atol=1e-5
        )
        if label is not None:
            assert label.dtype == np.uint8
            truth = np.asarray(read_nifti(source[1] / f"scan_{number}.nii.gz").values)
            np.testing.assert_array_equal(files.VALUES[label], truth)
    description = json.loads((dest / "dataset.json").read_text())
    assert description["class_names"] == ["background", "liver", "left kidney", "spleen"]
    assert description["label_values"] == files.VALUES.tolist()
    assert description["preprocessing"] == {
        "orientation": "RAS", "spacing": [1.2, 1.0, 2.5],
        "channels": [{"kind": "standardise", "clip": None, "mean": None, "deviation": None}],
    }  # fmt: skip
    printed = capsys.readouterr().out
    assert "8 images, 6 of them labelled" in printed and "modality: mr (guessed" in printed
    assert "Nothing suspicious." in printed
    assert (dest / "findings.md").read_text().strip() in printed
    commands = re.findall(r"--config (\S+)", printed)
    assert [Path(path).name for path in commands] == ["mper.yaml", "supervised.yaml", "vclipseg.yaml"]


def test_configurations_follow_the_data(source):
    dest = prepare(source, "--labelled", "2")
    for method in ("supervised", "mper", "vclipseg"):
        config = load_config(str(dest / f"{method}.yaml"))
        assert (config.method.name, config.name) == (method, f"dest_{method}")
        assert config.training.patch_size == (48, 32, 16)  # of 40 × 36 × 16 voxels
        assert config.evaluation.stride == (24, 16, 8)
        assert (config.dataset.name, config.dataset.labelled) == ("own", 2)
        assert config.dataset.augmentation == "crop_dihedral"
        assert Path(config.dataset.root) == dest.resolve()
    method = load_config(str(dest / "mper.yaml")).method
    assert method.zero_box == (32, 21, 10) and method.update_requires_agreement


def test_the_files_say_which_axes_are_which(source, capsys):
    """One scan stored along other axes, its label along others again: the same cases come out."""
    expected = prepare(source)
    for path, orientation in (
        (source[0] / "scan_0.nii.gz", "PIL"),
        (source[1] / "scan_0.nii.gz", "LPS"),
        (source[1] / "scan_1.nii.gz", "SRA"),
    ):
        stored_as = nibabel.load(path)
        turned = stored_as.as_reoriented(
            nibabel.orientations.ornt_transform(
                nibabel.io_orientation(stored_as.affine), nibabel.orientations.axcodes2ornt(orientation)
            )
        )
        nibabel.save(turned, path)
    capsys.readouterr()
    dest = prepare(source, name="turned")
    noted = "stored along other axes than their images; their headers say how, so they are turned: "
    assert noted + "scan_0 (LPS), scan_1 (SRA)" in capsys.readouterr().err
    assert "RAS (7), PIL (1)" in (dest / "findings.md").read_text()
    for number in range(8):
        for ours, theirs in zip(
            stored(dest, f"scan_{number}"), stored(expected, f"scan_{number}"), strict=True
        ):
            np.testing.assert_allclose(ours, theirs, atol=1e-5) if ours is not None else None


def test_another_spacing_is_resampled(source):
    """A scan of voxels half as thick comes out at the median spacing, its structures as large and where they were."""
    spacing = (0.96, 1.2, 1.25)
    label = np.zeros((50, 30, 32), np.uint8)
    label[5:30, 4:12, 4:24] = 1
    label[5:30, 12:24, 10:24] = 2
    label[32:44, 8:26, 6:18] = 3
    image = 50.0 * label + np.random.default_rng(5).normal(0, 3, label.shape)
    files.write_image(source[0] / "scan_3.nii.gz", image, files.affine(spacing))
    files.write_label(source[1] / "scan_3.nii.gz", files.VALUES[label], files.affine(spacing))
    dest = prepare(source, "--skip-flip-check")
    resampled_image, resampled = stored(dest, "scan_3")
    assert resampled_image.shape == resampled.shape == (40, 36, 16)
    assert resampled_image.mean() == pytest.approx(0, abs=1e-5)
    assert resampled_image.std() == pytest.approx(1, abs=1e-5)
    for number in range(1, 4):
        before = (label == number).sum() * np.prod(spacing)
        assert (resampled == number).sum() * np.prod(files.SPACING) == pytest.approx(before, rel=0.15)
        centres = [
            (np.argwhere(one == number).mean(0) + 0.5) * size
            for one, size in ((label, spacing), (resampled, files.SPACING))
        ]
        np.testing.assert_allclose(*centres, atol=0.5)  # mm from the first corner
    means = [resampled_image[resampled == number].mean() for number in range(4)]
    np.testing.assert_allclose(np.diff(means) / (means[1] - means[0]), 1, atol=0.2)


def test_spacing_and_patch_that_are_asked_for(source, capsys):
    rewrite(source[1] / "scan_2.nii.gz", keep_one_voxel_of_the_last_class)
    dest = prepare(source, "--spacing", "2.4", "2", "2.5", "--skip-flip-check")
    assert "note: 1 structures have no voxel left at the spacing chosen: scan_2 (class 3)" in capsys.readouterr().err
    assert 7 in read_nifti(source[1] / "scan_2.nii.gz").values and 3 not in stored(dest, "scan_2")[1]
    assert stored(dest, "scan_7")[0].shape == (20, 18, 16)
    assert load_config(str(dest / "supervised.yaml")).training.patch_size == (16, 16, 16)
    case = next(open_dataset("own", dest).evaluation_cases("test"))
    assert case.spacing == (2.4, 2.0, 2.5)


def keep_one_voxel_of_the_last_class(values: np.ndarray) -> np.ndarray:
    others = np.argwhere(values == 7)[1:]
    values[tuple(others.T)] = 0
    return values


def test_computed_tomography_is_scaled_by_the_labelled_voxels(source, capsys):
    for path in source[0].iterdir():
        rewrite(path, lambda values: np.where(values < 115, -1000, values))
    dest = prepare(source, "--labelled", "3")
    assert "modality: ct (guessed" in capsys.readouterr().out
    training = names(dest, "train")[:3]
    raw = {name: np.asarray(read_nifti(source[0] / f"{name}.nii.gz").values, np.float64) for name in training}
    foreground = np.concatenate(
        [raw[name][read_nifti(source[1] / f"{name}.nii.gz").values > 0] for name in training]
    )
    low, high = np.percentile(foreground, (0.5, 99.5))
    clipped = foreground.clip(low, high)
    (intensity,) = open_dataset("own", dest).preprocessing.channels
    assert intensity.clip == pytest.approx((low, high), rel=1e-5)
    for name, values in raw.items():
        expected = (values.clip(low, high) - clipped.mean()) / clipped.std()
        np.testing.assert_allclose(stored(dest, name)[0], expected, atol=1e-3)


def test_fewer_labelled_cases_leave_more_unlabelled_ones(source):
    dataset = open_dataset("own", prepare(source))
    listed = names(dataset.root, "train")
    for count in (1, 5):
        labelled, unlabelled = dataset.training_cases(count)
        assert [case.name for case in (*labelled, *unlabelled)] == listed
        assert len(labelled) == count and all(isinstance(case, UnlabelledCase) for case in unlabelled)
    with pytest.raises(ValueError, match="dataset.labelled is 6, accepted are 1 to 5, the labelled volumes that"):
        dataset.training_cases(6)


def test_lists_decide(source, tmp_path):
    (tmp_path / "test.txt").write_text("scan_4\nscan_2\n")
    (tmp_path / "labelled.txt").write_text("scan_5\nscan_0\n")
    dest = prepare(
        source, "--test", str(tmp_path / "test.txt"), "--validation", "1",
        "--labeled", str(tmp_path / "labelled.txt")
    )  # fmt: skip
    assert names(dest, "test") == ["scan_4", "scan_2"]
    (validation,) = names(dest, "val")
    assert names(dest, "train")[:2] == ["scan_5", "scan_0"]
    assert validation in ("scan_1", "scan_3")
    assert sorted([*names(dest, "train"), validation]) == [f"scan_{k}" for k in (0, 1, 3, 5, 6, 7)]
    dataset = open_dataset("own", dest)
    assert dataset.has_validation
    assert [case.name for case in dataset.evaluation_cases("validation")] == [validation]
    assert load_config(str(dest / "mper.yaml")).dataset.labelled == 2


def test_a_validation_list_is_used_while_training(source):
    for options, interval in (((), 0), (("--validation", "1"), 200)):
        dest = prepare(source, *options, name=f"dest{interval}")
        for path in dest.glob("*.yaml"):
            assert load_config(str(path)).evaluation.validation_interval == interval


def test_scans_of_one_patient_stay_together(source, tmp_path, capsys):
    for folder in source:
        for path in sorted(folder.iterdir()):
            number = int(path.name[5])
            path.rename(path.with_name(f"p{number // 2 if number < 6 else number - 6}_{number}.nii.gz"))
    (tmp_path / "test.txt").write_text("p0_0\n")
    dest = prepare(source, "--patient", r"p\d+", "--test", str(tmp_path / "test.txt"))
    assert names(dest, "test") == ["p0_0"]
    assert sorted(names(dest, "train")) == ["p1_2", "p1_3", "p1_7", "p2_4", "p2_5"]
    assert (
        "2 scans are left out, since another one of their patient is for evaluation: p0_1, p0_6"
        in capsys.readouterr().err
    )


def test_a_copy_of_a_test_image_is_not_trained_on(source, tmp_path):
    shutil.copy(source[0] / "scan_1.nii.gz", source[0] / "scan_7.nii.gz")
    (tmp_path / "test.txt").write_text("scan_1\n")
    dest = prepare(source, "--test", str(tmp_path / "test.txt"))
    assert "the same image: scan_1, scan_7" in (dest / "findings.md").read_text()
    assert "scan_7" not in names(dest, "train")


def test_common_endings_and_one_folder_for_both(source):
    expected = prepare(source)
    (together := source[0].parent / "together").mkdir()
    for number in range(8):
        shutil.copy(source[0] / f"scan_{number}.nii.gz", together / f"scan_{number}_0000.nii.gz")
        if number < 6:
            ending = ("gt", "seg", "label")[number % 3]
            shutil.copy(source[1] / f"scan_{number}.nii.gz", together / f"scan_{number}_{ending}.nii.gz")
    dest = prepare((together, together), name="../dest_together")
    for list_name in ("train", "test"):
        assert names(dest, list_name) == names(expected, list_name)


def test_nrrd_files_and_dicom_series_are_prepared_as_nifti_is(tmp_path):
    """Images as a scanner and labels as 3D Slicer leave them: voxel by voxel what the same in NIfTI gives."""
    random, spacing = np.random.default_rng(0), 1.5
    placed = challenges.LPS @ np.diag([spacing, spacing, spacing, 1])
    nifti, other = ((tmp_path / kind / "images", tmp_path / kind / "labels") for kind in ("nifti", "other"))
    for number in range(8):
        image, label = challenges.anatomy(random, (40, 36, 16), 4)
        image, name = np.rint(image + 100), f"scan_{number}"
        challenges.write_nifti(nifti[0] / f"{name}.nii.gz", image, placed)
        if number % 2:
            challenges.write_nrrd(other[0] / f"{name}.nrrd", image, spacing)
        else:
            series = other[0] / name / "study"
            challenges.write_dicom_series(series, image, (spacing,) * 3, origin=(0.0, 0.0, 0.0))
        if number < 6:
            challenges.write_nifti(nifti[1] / f"{name}.nii.gz", label, placed)
            ending = (".seg", "-label", "")[number % 3]
            challenges.write_nrrd(other[1] / f"{name}{ending}.nrrd", label, spacing)
    expected, dest = prepare(nifti), prepare(other, name="of_other")
    for list_name in ("train", "test"):
        assert names(dest, list_name) == names(expected, list_name)
        for name in names(dest, list_name):
            for array, wanted in zip(stored(dest, name), stored(expected, name), strict=True):
                np.testing.assert_array_equal(array, wanted)
    findings = (dest / "findings.md").read_text()
    assert findings == (expected / "findings.md").read_text() and "8 images, 6 of them labelled" in findings


def test_labels_may_end_in_the_channel_as_their_images_do(source):
    expected = prepare(source)
    for folder in source:
        for path in sorted(folder.iterdir()):
            path.rename(path.with_name(path.name.replace(".nii", "_0000.nii")))
    dest = prepare(source, name="same")
    for list_name in ("train", "test"):
        assert names(dest, list_name) == names(expected, list_name)


def test_images_may_end_as_labels_do(source):
    for folder in source:
        for path in sorted(folder.iterdir()):
            path.rename(path.with_name(path.name.replace(".nii", "_seg.nii")))
    dest = prepare(source)
    assert stored(dest, "scan_0_seg")[1] is not None and len(names(dest, "train")) == 7


def test_a_number_of_the_only_label_is_no_channel(source):
    for folder, ending in zip(source, ("_0000", ""), strict=True):
        for path in sorted(folder.iterdir()):
            number = int(path.name[5])
            path.rename(path.with_name(f"scan_{number if number < 2 else 10 * number:04d}{ending}.nii.gz"))
    for path in source[1].iterdir():
        if path.name not in ("scan_0000.nii.gz", "scan_0001.nii.gz"):
            path.unlink()
    dest = prepare(source)
    assert {"scan_0000", "scan_0001"} < {*names(dest, "train"), *names(dest, "test")}


def test_a_number_of_the_scan_is_no_channel(source):
    for folder in source:
        for path in sorted(folder.iterdir()):
            path.rename(path.with_name(f"scan_{int(path.name[5]):04d}.nii.gz"))
    dest = prepare(source)
    assert "scan_0007" in names(dest, "train")


def test_endings_in_large_letters_and_decomposed_names(source):
    """As a Mac writes ü, and as some scanners write endings."""
    names_of = {"scan_0": "Müller", "scan_1": "SCAN_1"}
    for folder, form in zip(source, ("NFC", "NFD"), strict=True):
        for old, new in names_of.items():
            (folder / f"{old}.nii.gz").rename(folder / f"{unicodedata.normalize(form, new)}.NII.GZ")
    dest = prepare(source, "--labelled", "5")
    assert set(names_of.values()) < {*names(dest, "train"), *names(dest, "test")}
    assert all(stored(dest, name)[1] is not None for name in names_of.values())


def test_a_list_finds_a_name_in_another_unicode_form(source, tmp_path):
    for folder in source:
        (folder / "scan_0.nii.gz").rename(folder / unicodedata.normalize("NFD", "Müller.nii.gz"))
    (tmp_path / "test.txt").write_text(unicodedata.normalize("NFD", "Müller\n"))
    assert names(prepare(source, "--test", str(tmp_path / "test.txt")), "test") == ["Müller"]


@pytest.mark.parametrize("name", [" a", "a ", "a\u2028b", "a\nb", "a\x1bb", os.fsdecode(b"M\xfcller")])
@pytest.mark.parametrize("folder", [0, 1])
def test_names_that_lists_cannot_hold_are_refused(source, capsys, monkeypatch, name, folder):
    monkeypatch.setattr("semiseg.preparation.own.survey", None)  # refused before it
    path = (source[folder] / "scan_0.nii.gz").rename(source[folder] / f"{name}.nii.gz")
    message = refusal(capsys, source)
    assert message.startswith(f"error: {str(path)!r}: names the case {name!r}, accepted are names in UTF-8")


def test_a_destination_that_cannot_be_made_is_refused_first(source, capsys, monkeypatch):
    monkeypatch.setattr("semiseg.preparation.own.find_scans", None)  # refused before it
    (source[0].parent.parent / "afile").write_text("precious")
    (source[0].parent.parent / "loop").symlink_to("loop")
    for dest, message in (
        ("afile/prep", r"afile/prep: cannot be written, as \S+afile is no folder"),
        (os.fsdecode(b"M\xfcller"), "accepted are names in UTF-8"),
        ("/", "error: /: is the root of the file system, accepted is a new name below it"),
        ("loop", "loop: cannot be written .Too many levels of symbolic links"),
        ("new/" + "ü" * 128, "ü: accepted are names of up to 255 bytes"),
    ):
        with pytest.raises(SystemExit):
            prepare(source, name=dest)
        assert re.search(message, capsys.readouterr().err)
    (source[0].parent.parent / "dest").mkdir()
    with monkeypatch.context() as mounted:
        mounted.setattr(os.path, "ismount", lambda path: path.name == "dest")
        assert "dest is where a file system is mounted, accepted is a new folder within" in refusal(capsys, source)
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write everywhere
    assert re.search(r"dest: cannot be written, as the folder \S+ is not writable", refusal(capsys, source))


def test_names_as_long_as_file_systems_take(source):
    long = "ü" * 123
    for folder in source:
        (folder / "scan_0.nii.gz").rename(folder / f"{long}.nii.gz")
    dest = prepare(source, "--labelled", "5", name=long)
    assert dest.is_dir() and stored(dest, long)[1] is not None


def test_what_a_killed_process_left_is_no_obstacle(source):
    leftover = source[0].parent.parent / f".dest.{socket.gethostname()}.{os.getpid()}"
    (leftover / "cases").mkdir(parents=True)
    assert (prepare(source) / "train.list").is_file() and not leftover.exists()


def test_what_other_processes_left_or_are_writing_is_named_and_kept(source, capsys):
    folder = source[0].parent.parent
    left, another = folder / ".dest[1].far.example.org.7", folder / ".dest1.far.7"
    for path in (left, another):
        path.mkdir()
    assert (prepare(source, name="dest[1]") / "train.list").is_file()
    assert left.is_dir() and another.is_dir()
    (line,) = (line for line in capsys.readouterr().err.splitlines() if "unfinished" in line)
    assert line == (
        "note: 1 unfinished folders of dest[1] may be removed if no other preparation is running: " + str(left)
    )
    prepare(source)
    assert "unfinished" not in capsys.readouterr().err


@pytest.mark.parametrize("names", [
    ("a", "background", "c"), ("a", "b", "a"), ("a", "", "c"), ("a", " ", "c"), ("a", "b\nb", "c"),
    ("a", os.fsdecode(b"M\xfcller"), "c"),
])  # fmt: skip
def test_names_of_classes_are_checked_before_the_survey(names, source, capsys, monkeypatch):
    monkeypatch.setattr("semiseg.preparation.own.survey", None)
    message = refusal(capsys, source, "--classes", *names)
    assert re.search("--classes is .*, accepted are distinct names in UTF-8 .*none of them background", message)


def test_swapped_folders_are_guessed(source, capsys):
    assert "for this label; are the folders swapped?" in refusal(capsys, (source[1], source[0]))


def test_labels_of_many_values_are_taken_for_images(source, capsys):
    """As those are where both folders hold as many files."""
    rewrite(source[1] / "scan_1.nii.gz", lambda values: np.arange(values.size).reshape(values.shape) % 100)
    message = refusal(capsys, source, "--labelled", "1")
    assert "hold no voxel of class" in message and message.endswith("is the folder of the labels one of images?")


@pytest.mark.parametrize("options", [(), ("--skip-flip-check",)])
def test_a_label_placed_elsewhere_is_noted(source, capsys, options):
    path = source[1] / "scan_2.nii.gz"
    label, placed = read_nifti(path), files.affine()
    placed[:3, 3] += 50
    files.write_label(path, np.asarray(label.values), placed)
    prepare(source, *options)
    assert "headers place the label elsewhere than its image; voxels are matched by their index: scan_2" in (
        capsys.readouterr().err
    )


def test_a_spacing_that_takes_too_much_memory_is_refused_before_the_survey(source, capsys, monkeypatch):
    monkeypatch.setattr("semiseg.preparation.own.survey", None)
    message = refusal(capsys, source, "--spacing", "0.001", "0.001", "0.001")
    assert re.search(r"--spacing is 0.001 × 0.001 × 0.001: \S+scan_0.nii.gz: .* which take .* GB", message)


@pytest.mark.parametrize("damage", ["shape", "spacing", "four axes"])
def test_what_headers_tell_is_refused_before_the_survey(source, capsys, monkeypatch, damage):
    monkeypatch.setattr("semiseg.preparation.own.survey", None)
    change, message = DAMAGES[damage]
    change(*source)
    assert message in refusal(capsys, source)


def test_a_label_half_way_between_two_axes_is_turned_as_its_image_is(source):
    def rotate(folder: Path, degrees: float) -> None:
        placed = np.eye(4)
        placed[:3, :3] = Rotation.from_euler("z", degrees, degrees=True).as_matrix() * files.SPACING
        for path in folder.iterdir():
            nibabel.save(nibabel.Nifti1Image(np.array(read_nifti(path).values), placed), path)

    for folder in source:
        rotate(folder, 44.9999)
    expected = prepare(source)
    rotate(source[1], 45.0001)
    dest = prepare(source, name="rotated")
    for number in range(6):
        for ours, theirs in zip(stored(dest, f"scan_{number}"), stored(expected, f"scan_{number}"), strict=True):
            np.testing.assert_array_equal(ours, theirs)


def test_a_header_that_takes_too_much_memory_is_named(source, capsys):
    image = read_nifti(source[0] / "scan_6.nii.gz")
    files.write_image(image.path, np.asarray(image.values), files.affine((500, 500, 500)))
    assert re.search(
        r"scan_6.nii.gz: 40 × 36 × 16 voxels of 500 .* GB of this machine", refusal(capsys, source)
    )


def test_suspicious_cases_are_named(source, capsys):
    rewrite(source[1] / "scan_2.nii.gz", lambda values: np.where(values == 3, 0, values))
    small = read_nifti(source[0] / "scan_6.nii.gz")
    files.write_image(small.path, np.asarray(small.values)[:15], small.affine)
    files.write_image(
        source[0] / "scan_7.nii.gz", np.asarray(read_nifti(source[0] / "scan_7.nii.gz").values),
        files.affine((1.2, 1.0, 6.0)),
    )  # fmt: skip
    rewrite(source[1] / "scan_5.nii.gz", enlarge)
    findings = (prepare(source, "--skip-flip-check") / "findings.md").read_text()
    for line in (
        "scan_2: no voxel of class 2",
        "scan_6: extent 18 × 36 × 40 mm, the median is 48 × 36 × 40",
        "scan_7: spacing 1.2 × 1 × 6 mm, the median is 1.2 × 1 × 2.5",
    ):
        assert f"- {line}" in findings
    assert re.search(r"- scan_5: \S+ ml of class 1, the median is", findings)
    assert findings.count("\n- scan_0") == 0


def enlarge(values: np.ndarray) -> np.ndarray:
    values[:, :18][values[:, :18] == 0] = 1
    return values


def test_frequencies_of_the_classes(source):
    findings = (prepare(source) / "findings.md").read_text()
    labels = [np.asarray(read_nifti(path).values) for path in sorted(source[1].iterdir())]
    for number, value in enumerate((1, 3, 7), start=1):
        millilitres = [(label == value).sum() * np.prod(files.SPACING) / 1000 for label in labels]
        share = 100 * np.mean([label == value for label in labels])
        cells = [f"class {number}", f"{value}", "6", f"{share:.3g}",
                 *(f"{way(millilitres):.4g}" for way in (min, np.median, max))]  # fmt: skip
        rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in findings.splitlines()]
        assert cells in rows


TINY = ["network.filters=[2]", "training.patch_size=[32, 32, 16]", "evaluation.stride=[32, 32, 16]",
        "training.labelled_batch=2", "training.unlabelled_batch=2"]  # fmt: skip
METHODS = {
    "supervised": ["method.iterations=2"],
    "mper": ["method.iterations=2", "method.pretraining_iterations=2", "method.zero_box=[20, 20, 10]"],
    "vclipseg": ["method.iterations=2", "method.prompt_width=8", "method.controller_widths=[4, 4]",
                 "method.text_width=8"],
}  # fmt: skip


def test_every_method_trains_and_is_evaluated_with_what_was_written(tmp_path):
    dest = prepare(files.own_source(tmp_path / "source", 4, 2, (26, 34, 9)), "--classes", "a", "b", "c")
    for method, overrides in METHODS.items():
        output = f"output={tmp_path / method}"
        config = load_config(str(dest / f"{method}.yaml"), [*TINY, *overrides, output])
        run = train(config)
        results = evaluate(config, run)
        (metrics,) = results["cases"].values()
        assert results["classes"] == ["background", "a", "b", "c"] and set(metrics) == {"a", "b", "c"}
        assert "hd95_mm" in metrics["a"]
        assert json.loads(run.dataset.read_text()) == json.loads((dest / "dataset.json").read_text())


def test_without_unlabelled_cases_only_the_baseline_is_there(tmp_path):
    source = files.own_source(tmp_path / "source", 3, 0, (26, 34, 9))
    dest = prepare(source)
    assert [path.name for path in dest.glob("*.yaml")] == ["supervised.yaml"]
    with_unlabelled = prepare(source, "--labelled", "1", name="fewer")
    assert len(list(with_unlabelled.glob("*.yaml"))) == 3


def test_a_sided_organ_is_not_mirrored(tmp_path):
    source = files.own_source(tmp_path / "source", 3, 1, (26, 34, 9))
    options = ("--spacing", "1", "1", "2")
    for second, third, expected in (
        ("kidney left", "kidney right", "crop"),
        ("LeftKidney", "rightkidney", "crop"),
        ("kidney_l", "kidney_r", "crop"),
        ("Lung (R)", "Lung (L)", "crop"),
        ("RT femur", "LT femur", "crop"),
        ("kidney left", "spleen", "crop_dihedral"),
        ("pedal", "pedar", "crop_dihedral"),
    ):
        dest = prepare(source, "--classes", "liver", second, third, *options, name=f"{second} {third}")
        assert yaml.safe_load((dest / "mper.yaml").read_text())["dataset"]["augmentation"] == expected


def test_labels_are_compared_with_their_images_class_by_class(source, monkeypatch):
    """The classes are numbered by the order of their values, also where a label has no background."""
    seen = {}

    def look_at(placement, name, image, label, stored, _):
        seen[name] = np.array_equal(label, np.searchsorted(files.VALUES, stored.values))

    monkeypatch.setattr(LabelPlacement, "look_at", look_at)
    rewrite(source[1] / "scan_0.nii.gz", lambda values: np.maximum(values, 1))
    prepare(source)
    assert seen == {f"scan_{number}": True for number in range(6)}


def test_mirrored_labels_are_named_and_the_remedy_works(source, capsys):
    expected = prepare(source, name="expected")
    for path in source[1].iterdir():
        rewrite(path, lambda values: values[::-1])
    message = refusal(capsys, source)
    assert "6 of 6 labels lie mirrored" in message and "--flip-labels x" in message
    dest = prepare(source, "--flip-labels", "x", name="flipped")
    for number in range(6):
        np.testing.assert_array_equal(
            stored(dest, f"scan_{number}")[1], stored(expected, f"scan_{number}")[1]
        )


def test_a_label_that_fits_a_little_better_mirrored_is_noted(source, capsys, monkeypatch):
    monkeypatch.setattr("semiseg.preparation.checks.DECISIVE", np.inf)
    rewrite(source[1] / "scan_4.nii.gz", lambda values: values[:, ::-1])
    prepare(source)
    assert (
        "1 labels fit their images a little better mirrored along the axes in brackets; look at them: scan_4 (y)"
        in capsys.readouterr().err
    )


def shifted_affine(path: Path) -> None:
    files.write_label(path, np.asarray(read_nifti(path).values), files.affine((1.2, 1.0, 3.0)))


DAMAGES = {
    "no images": (lambda images, labels: shutil.rmtree(images), "images: no such folder"),
    "images empty": (
        lambda images, labels: [path.unlink() for path in images.iterdir()],
        "images: holds no images; expected files that end in .nii.gz, .nii, .nrrd, .mha, .mhd, ",
    ),
    "slices among the images": (
        lambda images, labels: challenges.write_dicom_series(images, np.zeros((4, 4, 4)), (1, 1, 1)),
        "000.dcm: lies in the folder of all scans; expected a folder for every DICOM series",
    ),
    "two series": (
        lambda images, labels: [
            challenges.write_dicom_series(images / "scan_8" / name, np.zeros((4, 4, 4)), (1, 1, 1)) for name in "ab"
        ],
        "scan_8: holds 2 DICOM series, ",
    ),
    "no labels": (
        lambda images, labels: [path.unlink() for path in labels.iterdir()],
        "labels: holds no labels",
    ),
    "label without image": (
        lambda images, labels: (images / "scan_2.nii.gz").unlink(),
        "scan_2.nii.gz: there is no image called scan_2 in",
    ),
    "name twice": (
        lambda images, labels: shutil.copy(labels / "scan_2.nii.gz", labels / "scan_2_seg.nii.gz"),
        "are both called 'scan_2'; expected one of them",
    ),
    "NaN": (lambda images, labels: poison(images / "scan_7.nii.gz"), "scan_7.nii.gz: holds NaN or infinity"),
    "constant": (
        lambda images, labels: files.write_label(
            images / "scan_7.nii.gz", np.full((9, 9, 9), 3), np.eye(4)
        ),
        "scan_7.nii.gz: holds 3 everywhere; expected an image",
    ),
    "all background": (
        lambda images, labels: rewrite(labels / "scan_3.nii.gz", np.zeros_like),
        "scan_3.nii.gz: labels no voxel; expected some foreground",
    ),
    "fractions": (
        lambda images, labels: files.write_image(
            labels / "scan_3.nii.gz", np.asarray(read_nifti(labels / "scan_3.nii.gz").values) / 2,
            files.affine(),
        ),
        "expected whole numbers from 0 to 65535",
    ),
    "shape": (
        lambda images, labels: rewrite(labels / "scan_3.nii.gz", lambda values: values[1:]),
        "the label has shape (39, 36, 16) and its image",
    ),
    "spacing": (lambda images, labels: shifted_affine(labels / "scan_3.nii.gz"), "the label has spacing"),
    "truncated": (
        lambda images, labels: (images / "scan_6.nii.gz").write_bytes(
            (images / "scan_6.nii.gz").read_bytes()[:-500]
        ),
        "scan_6.nii.gz: cannot be read as NIfTI",
    ),
    "four axes": (
        lambda images, labels: nibabel.save(
            nibabel.Nifti1Image(np.ones((4, 4, 4, 2), np.float32), np.eye(4)), images / "scan_6.nii.gz"
        ),
        "the number of channels is 2, accepted is that of",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("damage", "message"), DAMAGES.values(), ids=DAMAGES)
def test_bad_input_ends_in_one_line_before_anything_is_written(source, capsys, damage, message):
    damage(*source)
    assert message in refusal(capsys, source)


@pytest.mark.parametrize(("options", "message"), [
    (("--classes", "a", "b"), "--classes names 2 classes, but the labels hold 3 values besides 0: 1, 3, 7"),
    (("--classes", "a", "b", "a"), "accepted are distinct names"),
    (("--test", "6"), "--test and --validation take 6 of 6 labelled patients"),
    (("--test", "3", "--validation", "3"), "take 6 of 6 labelled patients, accepted are fewer"),
    (("--test", "0"), "--test is 0, accepted are numbers from 1"),
    (("--labelled", "6"), "--labelled is 6, accepted are 1 to 5, the labelled cases that are left to train on"),
    (("--labelled", "nowhere.txt"), "--labelled is nowhere.txt, accepted are numbers from 1, or a file that exists"),
    (("--test", "20%"), "--test is 20%, accepted are numbers from 1, or a file that exists"),
    (("--patient", "["), "--patient is '[', which is no regular expression"),
    (("--patient", r"\d"), "which matches nothing at the start of 'scan_0'"),
    (("--spacing", "1", "0", "1"), "accepted are three positive numbers of mm"),
    (("--spacing", "1", "nan", "1"), "accepted are three positive numbers of mm"),
    (("--spacing", "400", "400", "400"), "nothing labelled is left at 400 × 400 × 400 mm"),
    (("--flip-labels", "u"), "--flip-labels is 'u'"),
])  # fmt: skip
def test_impossible_choices(source, capsys, options, message):
    assert message in refusal(capsys, source, *options)


def test_a_list_that_is_no_text_is_named(source, capsys):
    path = source[1] / "scan_0.nii.gz"
    assert f"{path}: no text in UTF-8" in refusal(capsys, source, "--test", str(path))


def test_a_list_may_name_labelled_scans_only(source, tmp_path, capsys):
    (tmp_path / "test.txt").write_text("scan_7\n")
    message = refusal(capsys, source, "--test", str(tmp_path / "test.txt"))
    assert "test.txt: 'scan_7' is none of the 6 labelled scans" in message


def test_a_class_that_no_labelled_training_case_shows_is_named(source, tmp_path, capsys):
    rewrite(source[1] / "scan_1.nii.gz", lambda values: np.where(values == 7, 0, values))
    (tmp_path / "labelled.txt").write_text("scan_1\n")
    message = refusal(capsys, source, "--labelled", str(tmp_path / "labelled.txt"))
    assert "the 1 cases to learn from hold no voxel of class 3 (value 7)" in message


def test_lists_changed_by_hand_are_compared(source, monkeypatch):
    dest = prepare(source, "--validation", "1")
    (dest / "val.list").write_text("scan_7\n")  # without a label
    monkeypatch.setattr(h5py, "File", None)
    message = "val.list: names 'scan_7', and the training list 'scan_7'; a patient may be in only one of the lists"
    with pytest.raises(ValueError, match=message):
        open_dataset("own", dest).training_cases(1)
