"""The datasets on disk, on folders made up by the tests and, where SEMISEG_DATA is set, on the real ones."""

import itertools
from pathlib import Path

import h5py
import numpy as np
import pytest
from h5_files import random_case, write_case

from semiseg.data import open_dataset

VOLUME = ("2018LA_Seg_Training Set", "mri_norm2.h5")


def volume_file(root: Path, name: str) -> Path:
    return root / VOLUME[0] / name / VOLUME[1]


def test_left_atrium_splits_the_list_in_order(left_atrium):
    dataset = open_dataset("la", left_atrium)
    labelled, unlabelled = dataset.training_cases(2)
    assert [case.name for case in labelled] == ["CASE3", "CASE1"]
    assert [case.name for case in unlabelled] == ["CASE4", "CASE0", "CASE2"]
    assert [case.name for case in dataset.evaluation_cases("test")] == ["CASE5", "CASE6"]
    assert (dataset.class_names, dataset.dimensions, dataset.has_validation) == (
        ("background", "left atrium"),
        3,
        False,
    )


def test_a_case_is_what_the_file_holds(left_atrium):
    case = open_dataset("la", left_atrium).training_cases(1)[0][0]
    with h5py.File(volume_file(left_atrium, "CASE3")) as file:
        np.testing.assert_array_equal(case.image, file["image"][()][np.newaxis], strict=True)
        np.testing.assert_array_equal(case.label, file["label"][()])
    assert (case.image.dtype, case.label.dtype, case.spacing) == (np.float32, np.uint8, (0.625, 0.625, 0.625))


def test_stored_types_are_converted(left_atrium):
    image, label = random_case(np.random.default_rng(1), (5, 6, 7), 2)
    write_case(volume_file(left_atrium, "CASE3"), image.astype(np.float64), label.astype(np.float32))
    case = open_dataset("la", left_atrium).training_cases(1)[0][0]
    np.testing.assert_array_equal(case.label, label)
    assert (case.image.dtype, case.label.dtype) == (np.float32, np.uint8)


@pytest.mark.parametrize(("patients", "slices"), [(1, 4), (2, 6), (3, 12)])
def test_acdc_counts_patients_in_the_order_of_the_list(acdc, patients, slices):
    dataset = open_dataset("acdc", acdc)
    labelled, unlabelled = dataset.training_cases(patients)
    assert [case.name for case in labelled + unlabelled] == (acdc / "train_slices.list").read_text().split()
    assert len(labelled) == slices
    assert all(case.image.shape == (1, 10, 8) and case.spacing is None for case in labelled)


def test_acdc_labels_whole_patients_of_an_interleaved_list(acdc):
    path = acdc / "train_slices.list"
    names = path.read_text().split()
    path.write_text("\n".join([names[-1], *names[:-1]]))
    labelled, unlabelled = open_dataset("acdc", acdc).training_cases(1)
    assert {case.name.split("_")[0] for case in labelled} == {"patient011"}
    assert len(labelled) == 6 and len(unlabelled) == 6


def test_acdc_evaluates_volumes(acdc):
    dataset = open_dataset("acdc", acdc)
    for split, patient in (("validation", "patient005"), ("test", "patient007")):
        cases = list(dataset.evaluation_cases(split))
        assert [case.name for case in cases] == [f"{patient}_frame01", f"{patient}_frame02"]
        assert all(case.image.shape == (1, *case.label.shape) == (1, 3, 10, 8) for case in cases)


@pytest.mark.parametrize("name", ["la", "acdc"])
def test_training_opens_no_test_file(name, request, opened):
    root = request.getfixturevalue({"la": "left_atrium", "acdc": "acdc"}[name])
    opened.clear()
    dataset = open_dataset(name, root)
    dataset.training_cases(1)
    if dataset.has_validation:
        list(dataset.evaluation_cases("validation"))
    test_names = (root / "test.list").read_text().split()
    assert opened
    assert not [path for path, test in itertools.product(opened, test_names) if test in path]


def test_evaluation_holds_one_volume_at_a_time(left_atrium, monkeypatch):
    from semiseg.data import files

    read = []
    read_case = files.read_case
    monkeypatch.setattr(
        files, "read_case", lambda path, name, *rest: read.append(name) or read_case(path, name, *rest)
    )
    cases = open_dataset("la", left_atrium).evaluation_cases("test")
    assert read == []
    next(cases)
    assert read == ["CASE5"]


@pytest.mark.parametrize(("name", "file"), [("la", "CASE6"), ("acdc", "patient007_frame02")])
def test_evaluation_of_some_cases_leaves_the_files_of_others_alone(name, file, request, opened):
    root = request.getfixturevalue({"la": "left_atrium", "acdc": "acdc"}[name])
    opened.clear()
    cases = open_dataset(name, root).evaluation_cases("test", [file])
    assert [case.name for case in cases] == [file]
    assert opened and all(file in path for path in opened)


def as_group(path: Path, image: np.ndarray) -> None:
    write_case(path, image, None)
    with h5py.File(path, "a") as file:
        file.create_group("label")


# What happens to the file of a volume (path, a good image, a good label), and what is said about it.
DAMAGES = {
    "missing": (lambda path, image, label: path.unlink(), "missing; expected an HDF5 file"),
    "no HDF5": (lambda path, image, label: path.write_text("image"), "cannot be read as HDF5"),
    "truncated": (
        lambda path, image, label: path.write_bytes(path.read_bytes()[:-200]),
        "cannot be read as HDF5",
    ),
    "no image": (lambda path, image, label: write_case(path, None, label), "no dataset 'image'"),
    "no label": (lambda path, image, label: write_case(path, image, None), "no dataset 'label'"),
    "group": (lambda path, image, label: as_group(path, image), "no dataset 'label'"),
    "no numbers": (
        lambda path, image, label: write_case(path, image.astype("S4"), label),
        r"'image' holds values of type \|S4; expected one number a voxel",
    ),
    "shapes": (
        lambda path, image, label: write_case(path, image, label[1:]),
        r"'image' has shape \(5, 6, 7\) and 'label' \(4, 6, 7\)",
    ),
    "axes": (
        lambda path, image, label: write_case(path, image[0], label[0]),
        r"'image' has shape \(6, 7\); expected 3 axes",
    ),
    "empty": (lambda path, image, label: write_case(path, image[:0], label[:0]), r"shape \(0, 6, 7\)"),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_training_file_is_named(left_atrium, damage, message):
    path = volume_file(left_atrium, "CASE2")
    damage(path, *random_case(np.random.default_rng(2), (5, 6, 7), 2))
    with pytest.raises((ValueError, FileNotFoundError), match=message) as raised:
        open_dataset("la", left_atrium).training_cases(2)
    assert str(path) in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize(("key", "value", "message"), [
    ("image", np.nan, "'image' holds NaN or infinity"),
    ("image", -np.inf, "'image' holds NaN or infinity"),
    ("label", 2.0, "'label' holds 2.0; expected integers from 0 to 1"),
    ("label", -1.0, "'label' holds -1.0"),
    ("label", 0.5, "'label' holds 0.5"),
    ("label", 256.0, "'label' holds 256.0"),
    ("label", np.nan, "'label' holds nan"),
])  # fmt: skip
def test_a_value_that_cannot_be_is_named(left_atrium, key, value, message):
    path = volume_file(left_atrium, "CASE2")
    image, label = random_case(np.random.default_rng(2), (5, 6, 7), 2)
    arrays = {"image": image, "label": label.astype(np.float32)}
    arrays[key][1, 2, 3] = value
    write_case(path, **arrays)
    with pytest.raises(ValueError, match=message) as raised:
        open_dataset("la", left_atrium).training_cases(2)
    assert str(path) in str(raised.value)


@pytest.mark.parametrize(("damage", "message"), DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_test_file_is_found_before_the_first_case(left_atrium, damage, message):
    damage(volume_file(left_atrium, "CASE6"), *random_case(np.random.default_rng(2), (5, 6, 7), 2))
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        open_dataset("la", left_atrium).evaluation_cases("test")


def test_a_damaged_slice_is_named(acdc):
    path = acdc / "data" / "slices" / "patient002_frame01_slice_1.h5"
    write_case(path, *random_case(np.random.default_rng(3), (3, 10, 8), 4))
    with pytest.raises(ValueError, match="expected 2 axes") as raised:
        open_dataset("acdc", acdc).training_cases(1)
    assert str(path) in str(raised.value)


@pytest.mark.parametrize(("name", "list_name"), [("la", "train.list"), ("acdc", "train_slices.list")])
def test_training_lists(name, list_name, request):
    root = request.getfixturevalue({"la": "left_atrium", "acdc": "acdc"}[name])
    dataset, path = open_dataset(name, root), root / list_name
    first = path.read_text().split()[0]
    path.write_text(f"{first}\n{first}\n")
    with pytest.raises(ValueError, match=f"{list_name}: names '{first}' more than once"):
        dataset.training_cases(1)
    path.write_text("\n \n")
    with pytest.raises(ValueError, match=f"{list_name}: empty"):
        dataset.training_cases(1)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=f"{list_name}: missing"):
        dataset.training_cases(1)


@pytest.mark.parametrize(("name", "list_name", "overlap", "message"), [
    ("la", "test.list", "CASE4",
     "test.list: names 'CASE4', and the training list 'CASE4'; a patient may be in only one of the lists"),
    ("acdc", "test.list", "patient011_frame02",
     "test.list: names 'patient011_frame02', and the training list 'patient011_"),
    ("acdc", "val.list", "patient030_frame01",
     "val.list: names 'patient030_frame01', and the training list 'patient030_"),
    ("acdc", "test.list", "patient005_frame02",
     "test.list: names 'patient005_frame02', and val.list 'patient005_frame02'; a patient may be in only one"),
])  # fmt: skip
def test_nobody_is_in_two_lists(name, list_name, overlap, message, request, opened):
    root = request.getfixturevalue({"la": "left_atrium", "acdc": "acdc"}[name])
    with (root / list_name).open("a") as file:
        file.write(f"{overlap}\n")
    opened.clear()
    with pytest.raises(ValueError, match=message):
        open_dataset(name, root).training_cases(1)
    assert opened == []


@pytest.mark.parametrize(("name", "list_name"), [("la", "test.list"), ("acdc", "val.list"), ("acdc", "test.list")])
def test_what_is_to_be_evaluated_is_there_before_training(name, list_name, request, opened):
    root = request.getfixturevalue({"la": "left_atrium", "acdc": "acdc"}[name])
    with (root / list_name).open("a") as file:
        file.write("nobody\n")
    opened.clear()
    with pytest.raises(FileNotFoundError, match=f"nobody.*: missing; .*{list_name} names 'nobody'"):
        open_dataset(name, root).training_cases(1)
    (root / list_name).unlink()
    with pytest.raises(FileNotFoundError, match=f"{list_name}: missing"):
        open_dataset(name, root).training_cases(1)
    assert opened == []


@pytest.mark.parametrize(("name", "split", "list_name"), [
    ("la", "test", "test.list"), ("acdc", "validation", "val.list"), ("acdc", "test", "test.list"),
])  # fmt: skip
def test_evaluation_lists(name, split, list_name, request):
    root = request.getfixturevalue({"la": "left_atrium", "acdc": "acdc"}[name])
    (root / list_name).unlink()
    with pytest.raises(FileNotFoundError, match=f"{list_name}: missing"):
        open_dataset(name, root).evaluation_cases(split)


@pytest.mark.parametrize(("name", "labelled", "message"), [
    ("la", 6, "dataset.labelled is 6, accepted are 1 to 5, the volumes that .*train.list holds"),
    ("la", 0, "labelled is 0"),
    ("acdc", 4, "dataset.labelled is 4, accepted are 1 to 3, the patients that .*train_slices.list holds"),
    ("phantom", 41, "dataset.labelled is 41, accepted are 1 to 40, the volumes that the phantom holds"),
])  # fmt: skip
def test_labelled_must_be_available(name, labelled, message, request, opened):
    fixture = {"la": "left_atrium", "acdc": "acdc"}.get(name)
    dataset = open_dataset(name, request.getfixturevalue(fixture) if fixture else None)
    opened.clear()
    with pytest.raises(ValueError, match=message):
        dataset.training_cases(labelled)
    assert opened == []


@pytest.mark.parametrize(
    ("name", "split"), [("la", "validation"), ("acdc", "train"), ("phantom", "training")]
)
def test_unknown_splits(name, split, request):
    fixture = {"la": "left_atrium", "acdc": "acdc"}.get(name)
    dataset = open_dataset(name, request.getfixturevalue(fixture) if fixture else None)
    with pytest.raises(ValueError, match=f"split is '{split}'"):
        dataset.evaluation_cases(split)


def test_root_from_the_environment(left_atrium, monkeypatch, tmp_path_factory):
    above = tmp_path_factory.mktemp("above")
    (above / "LA").symlink_to(left_atrium)
    monkeypatch.setenv("SEMISEG_DATA", str(above))
    assert len(open_dataset("la").training_cases(1)[0]) == 1
    with pytest.raises(FileNotFoundError, match="ACDC: no such folder"):
        open_dataset("acdc")
    for nowhere in (above / "nowhere", "~nobody/nowhere"):
        with pytest.raises(FileNotFoundError, match="nowhere: no such folder"):
            open_dataset("la", nowhere)


def test_no_root_at_all(monkeypatch):
    monkeypatch.delenv("SEMISEG_DATA", raising=False)
    with pytest.raises(ValueError, match="set the configuration's dataset.root .*SEMISEG_DATA"):
        open_dataset("la")


def test_names(tmp_path):
    with pytest.raises(ValueError, match="dataset.name is 'heart', accepted are la, acdc, pancreas, own, phantom"):
        open_dataset("heart", tmp_path)
    with pytest.raises(ValueError, match="root is .*, accepted for the phantom, which is generated, is none"):
        open_dataset("phantom", tmp_path)


@pytest.mark.data
@pytest.mark.parametrize(("patients", "slices"), [(3, 68), (7, 136)])
def test_real_acdc_has_the_field_s_counts(real_data, patients, slices):
    dataset = open_dataset("acdc", real_data / "ACDC")
    labelled, unlabelled = dataset.training_cases(patients)
    assert (len(labelled), len(labelled) + len(unlabelled)) == (slices, 1312)
    assert len({case.name.split("_")[0] for case in labelled}) == patients


@pytest.mark.data
def test_real_acdc_volumes(real_data):
    dataset = open_dataset("acdc", real_data / "ACDC")
    for split, count in (("validation", 20), ("test", 40)):
        maxima = [(case.label.ndim, int(case.label.max())) for case in dataset.evaluation_cases(split)]
        assert maxima == [(3, 3)] * count


@pytest.mark.data
def test_real_left_atrium(real_data):
    dataset = open_dataset("la", real_data / "LA")
    labelled, unlabelled = dataset.training_cases(8)
    assert (len(labelled), len(unlabelled)) == (8, 72)
    assert labelled[0].name == "06SR5RBREL16DQ6M8LWS"
    assert sum(1 for _ in dataset.evaluation_cases("test")) == 20
