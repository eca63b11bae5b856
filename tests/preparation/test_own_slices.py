"""Own data that a 2D network takes slice by slice: stacks of their own slices, from folders of scans to masks."""

import json
from pathlib import Path

import h5py
import nibabel
import nifti_files as files
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from test_own import names, prepare, refusal, standardised, stored

from semiseg.config import load_config
from semiseg.data import own as own_data
from semiseg.data.dataset import open_dataset
from semiseg.data.disk_image import DiskImage
from semiseg.engine.trainer import train
from semiseg.evaluate import evaluate
from semiseg.predict import main as predict
from semiseg.preparation.volume_files import read_nifti

TINY = ["network.filters=[2, 2, 4, 4, 8]", "training.labelled_batch=4", "training.unlabelled_batch=4",
        "training.patch_size=[32, 32]", "evaluation.stride=[16, 16]"]  # fmt: skip


@pytest.fixture
def source(tmp_path) -> tuple[Path, Path]:
    return files.own_source(tmp_path / "source")


def as_slices(values: np.ndarray) -> np.ndarray:
    """Axes to the right, anterior and superior as axial slices: from row to row to posterior, along them to the left."""
    return values.transpose(2, 1, 0)[:, ::-1, ::-1]


def place(path: Path, values: np.ndarray, spacing: tuple[float, ...]) -> None:
    """Write an image or a label anew, with voxels of another size."""
    write = files.write_label if path.parent.name == "labels" else files.write_image
    write(path, values, files.affine(spacing))


def test_layout_description_and_configurations(source):
    dest = prepare(source, "--slices", "--labelled", "2", "--classes", "chamber", "wall", "vessel")
    description = json.loads((dest / "dataset.json").read_text())
    assert description["dimensions"] == 2
    assert description["preprocessing"] == {
        "orientation": "SPL", "spacing": [None, 1.0, 1.2],
        "channels": [{"kind": "standardise", "clip": None, "mean": None, "deviation": None}],
    }  # fmt: skip
    for number in range(8):
        image, label = stored(dest, f"scan_{number}")
        expected = as_slices(standardised(source[0] / f"scan_{number}.nii.gz"))
        np.testing.assert_allclose(image, expected, rtol=1e-5, atol=1e-5)
        if number < 6:
            truth = as_slices(np.asarray(read_nifti(source[1] / f"scan_{number}.nii.gz").values))
            np.testing.assert_array_equal(files.VALUES[label], truth)
    for method in ("supervised", "mper", "vclipseg"):
        config = load_config(str(dest / f"{method}.yaml"))
        assert config.network.name == "unet" and config.dataset.augmentation == "crop_dihedral"
        assert config.training.patch_size == (32, 48) and config.evaluation.stride == (16, 24)
    assert load_config(str(dest / "mper.yaml")).method.zero_box == (21, 32)
    findings = (dest / "findings.md").read_text()
    assert "- slices as they lie, across the coarsest axis; pixels of 1 × 1.2 mm, by interpolation" in findings
    assert "--slices" not in findings


def test_slices_are_trained_on_and_volumes_evaluated(source):
    dataset = open_dataset("own", prepare(source, "--slices"))
    assert dataset.dimensions == 2
    labelled, unlabelled = dataset.training_cases(2)
    listed = names(dataset.root, "train")
    assert [case.name for case in labelled] == [f"{name}#{n}" for name in listed[:2] for n in range(1, 17)]
    assert [case.name for case in unlabelled] == [f"{name}#{n}" for name in listed[2:] for n in range(1, 17)]
    for cases, first in ((labelled, listed[0]), (unlabelled, listed[2])):
        np.testing.assert_array_equal([case.image[0] for case in cases[:16]], stored(dataset.root, first)[0])
    np.testing.assert_array_equal([case.label for case in labelled[16:]], stored(dataset.root, listed[1])[1])
    assert {dataset.patient(case.name) for case in (*labelled, *unlabelled)} == set(listed)
    (case,) = dataset.evaluation_cases("test")
    assert case.image.shape == (1, 16, 36, 40) and case.spacing == pytest.approx((2.5, 1.0, 1.2))


@pytest.mark.parametrize("spacing", [2.5, [1.0, 1.0], [1.0, 0.0, 2.0], [1.0, np.nan, 2.0], "thick"])
def test_a_stored_spacing_that_is_none_is_named(source, spacing):
    dataset = open_dataset("own", prepare(source, "--slices"))
    path = dataset.path(*dataset.evaluation_names("test"))
    with h5py.File(path, "a") as file:
        file.attrs["spacing"] = spacing
    with pytest.raises(ValueError, match=f"{path.name}: 'spacing' is .*; expected 3 positive numbers of mm"):
        next(dataset.evaluation_cases("test"))


def test_every_scan_keeps_its_slices_but_not_its_pixels(source, tmp_path):
    (tmp_path / "test.txt").write_text("scan_2\nscan_3\n")
    for folder in source:
        thick, fine = folder / "scan_2.nii.gz", folder / "scan_3.nii.gz"
        place(thick, read_nifti(thick).values, (1.2, 1.0, 9.0))
        place(fine, np.repeat(np.repeat(read_nifti(fine).values, 2, 0), 2, 1), (0.6, 0.5, 2.5))
    dest = prepare(source, "--slices", "--test", str(tmp_path / "test.txt"))
    thick, fine = open_dataset("own", dest).evaluation_cases("test")
    assert thick.spacing == pytest.approx((9.0, 1.0, 1.2)) and fine.spacing == pytest.approx((2.5, 1.0, 1.2))
    np.testing.assert_allclose(thick.image[0], as_slices(standardised(source[0] / "scan_2.nii.gz")), atol=1e-5)
    assert fine.image.shape == (1, 16, 36, 40)
    truth = as_slices(np.asarray(read_nifti(source[1] / "scan_3.nii.gz").values)[::2, ::2])
    np.testing.assert_array_equal(files.VALUES[fine.label], truth)


def test_slices_may_lie_across_any_axis(source, tmp_path):
    """One scan is a stack from posterior to anterior."""
    (tmp_path / "test.txt").write_text("scan_4\n")
    for folder in source:
        path = folder / "scan_4.nii.gz"
        place(path, read_nifti(path).values.transpose(0, 2, 1), (1.2, 6.0, 1.0))
    dest = prepare(source, "--slices", "--test", str(tmp_path / "test.txt"), "--skip-flip-check")
    (case,) = open_dataset("own", dest).evaluation_cases("test")
    assert case.spacing == pytest.approx((6.0, 1.0, 1.2)) and case.image.shape == (1, 16, 36, 40)
    values = standardised(source[0] / "scan_4.nii.gz")
    np.testing.assert_allclose(case.image[0], values.transpose(1, 2, 0)[::-1, ::-1, ::-1], atol=1e-5)
    assert open_dataset("own", dest).preprocessing.orientation == "SPL"  # of most


def test_pixels_that_are_asked_for(source):
    dest = prepare(source, "--slices", "--spacing", "2", "2.4", "--skip-flip-check")
    assert stored(dest, "scan_7")[0].shape == (16, 18, 20)
    assert load_config(str(dest / "supervised.yaml")).training.patch_size == (16, 16)


def test_wrong_numbers_of_spacings_are_refused(source, capsys):
    assert "--spacing is [1.0, 1.0, 2.0], accepted are two positive" in refusal(
        capsys, source, "--slices", "--spacing", "1", "1", "2"
    )
    assert "--spacing is [1.0, 1.0], accepted are three positive" in refusal(capsys, source, "--spacing", "1", "1")


def test_slices_that_lie_far_apart_are_pointed_out(source):
    for folder in source:
        for path in folder.iterdir():
            place(path, read_nifti(path).values, (1.2, 1.0, 6.0))
    assert "- slices lie 5 times as far apart as pixels: --slices prepares" in (
        (prepare(source) / "findings.md").read_text()
    )


def test_images_may_stay_in_their_files(source, monkeypatch):
    dataset = open_dataset("own", prepare(source, "--slices"))
    expected = dataset.training_cases(1)[1]
    size = (5 + 6 * 4) * 40 * 36 * 16
    monkeypatch.setattr(own_data, "available_memory", lambda: 2 * size - 1)
    for case, in_memory in zip(dataset.training_cases(1)[1], expected, strict=True):
        assert isinstance(case.image, DiskImage) and case.name == in_memory.name
        plane = torch.from_numpy(in_memory.image)
        assert case.image.shape == plane.shape and torch.equal(case.image.expand(), plane)
        turned, box = case.image.transpose(1, 2), (slice(0, 1), slice(3, 9), slice(2, 4))
        assert torch.equal(turned[box], plane.transpose(1, 2)[box])


def test_training_from_files_is_training_from_memory(source, tmp_path, monkeypatch, capsys):
    dest, weights = prepare(source, "--slices", "--labelled", "2"), []
    for available, on_disk in ((2**40, False), (600_000, True)):
        monkeypatch.setattr(own_data, "available_memory", lambda available=available: available)
        overrides = [*TINY, "method.pretraining_iterations=2", "method.iterations=3", "method.zero_box=[20, 20]"]
        config = load_config(str(dest / "mper.yaml"), [*overrides, f"output={tmp_path / str(available)}"])
        weights.append(load_file(train(config).path / "last.safetensors"))
        assert ("stay in their files" in capsys.readouterr().out) == on_disk
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])


@pytest.mark.parametrize("method", ["supervised", "vclipseg"])
def test_from_training_to_masks(source, tmp_path, method):
    """Results are in mm, and a mask lies on the grid of its scan, however far apart that one's slices are."""
    overrides = [*TINY, "method.iterations=2", f"output={tmp_path / 'run'}"]
    config = load_config(str(prepare(source, "--slices") / f"{method}.yaml"), overrides)
    run = train(config)
    evaluate(config, run)
    results = json.loads((run.path / "results.json").read_text())
    assert results["summary"]["unit"] == "mm" and set(results["cases"]) == set(names(tmp_path / "dest", "test"))
    assert (run.path / "report.html").is_file()
    scan = source[0] / "scan_7.nii.gz"
    place(scan, np.repeat(read_nifti(scan).values, 2, 0)[..., ::3], (0.6, 1.0, 7.5))
    predict(["--run", str(run.path), "--input", str(scan), "--output", str(tmp_path / "mask.nii.gz")])
    mask, image = nibabel.load(tmp_path / "mask.nii.gz"), nibabel.load(scan)
    assert mask.shape == image.shape == (80, 36, 6) and np.allclose(mask.affine, image.affine)
    assert set(np.unique(mask.dataobj)) <= set(files.VALUES)


def test_a_run_is_not_evaluated_on_what_it_was_trained_on(source, tmp_path):
    dest = prepare(source, "--slices")
    overrides = [*TINY, "method.iterations=1", f"output={tmp_path / 'run'}"]
    config = load_config(str(dest / "supervised.yaml"), overrides)
    run = train(config)
    first, *others = names(dest, "train")
    (dest / "train.list").write_text("\n".join(others) + "\n")
    (dest / "test.list").write_text(f"{first}\n")
    with pytest.raises(ValueError, match=f"was trained on '{first}'"):
        evaluate(config, run)
