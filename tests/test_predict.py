"""`python -m semiseg.predict` and `Predictor`: masks that lie where the scan says, whatever its axes and voxels."""

import os
import re
import shutil
import subprocess
import sys
import warnings
import weakref
from dataclasses import replace
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from challenge_files import (
    LPS,
    anatomy,
    enhanced_image,
    read_slices,
    write_dicom_series,
    write_nifti,
    write_nrrd,
)
from nibabel.affines import from_matvec
from nibabel.orientations import io_orientation
from scipy import ndimage
from untrained_runs import AS_STORED, untrained_run

from semiseg import Predictor
from semiseg.commands import command
from semiseg.data.preprocessing import Intensity, Preprocessing
from semiseg.evaluation.evaluator import predict_case
from semiseg.methods import Method
from semiseg.models.folding import fold_batch_norm
from semiseg.predict import find_scans, main
from semiseg.prediction import resampled_slabs
from semiseg.preparation.volume import Volume
from semiseg.preparation.volume_files import read_nifti

predict = main.__wrapped__  # without the exit status
THRESHOLD = 50.0
WHERE = Path("scan")


def oblique() -> np.ndarray:
    """Axes that lead roughly to superior, left and anterior, rotated by 25° and 10°, voxels of 3 × 0.8 × 1.2 mm."""
    a, b = np.deg2rad((25, 10))
    about_z = np.array([[np.cos(a), -np.sin(a), 0], [np.sin(a), np.cos(a), 0], [0, 0, 1]])
    about_x = np.array([[1, 0, 0], [0, np.cos(b), -np.sin(b)], [0, np.sin(b), np.cos(b)]])
    axes = np.array([[0, -1, 0], [0, 0, 1], [1, 0, 0]])
    affine = np.eye(4)
    affine[:3, :3] = about_x @ about_z @ axes @ np.diag([3.0, 0.8, 1.2])
    affine[:3, 3] = (12.5, -70.25, 33.0)
    return affine


def threshold(method, windows, head="linear"):
    """A network whose answer is known: organ where the scan is brighter than 50."""
    organ = (windows > THRESHOLD).float()
    return torch.cat([1 - organ, organ], dim=1)


@pytest.fixture
def thresholding(monkeypatch):
    monkeypatch.setattr(Method, "probabilities", threshold)


def scan(shape=(40, 37, 21)) -> np.ndarray:
    return anatomy(np.random.default_rng(0), shape)[0].astype(np.float32)


@pytest.mark.parametrize(
    "affine", [oblique(), LPS, np.diag([0.7, -1.0, 2.0, 1.0])], ids=["oblique", "LPS", "RPS"]
)
@pytest.mark.parametrize("orientation", [None, "LPS", "SPL"])
def test_the_mask_lies_on_the_grid_of_the_scan(affine, orientation, thresholding, tmp_path):
    image = scan()
    run = untrained_run(
        tmp_path / "run", preprocessing=Preprocessing(orientation, None, AS_STORED)
    )
    write_nifti(tmp_path / "scan.nii.gz", image, affine)
    predict(
        [
            "--run",
            str(run),
            "--input",
            str(tmp_path / "scan.nii.gz"),
            "--output",
            str(tmp_path / "mask.nii.gz"),
        ]
    )
    mask = nibabel.load(tmp_path / "mask.nii.gz")
    assert mask.get_data_dtype() == np.uint8
    assert mask.header["sform_code"] > 0 and mask.header["qform_code"] > 0
    assert mask.header.get_xyzt_units()[0] == "mm"
    np.testing.assert_allclose(mask.affine, affine, rtol=0, atol=1e-5)
    np.testing.assert_allclose(mask.header.get_zooms(), np.linalg.norm(affine[:3, :3], axis=0), rtol=1e-6)
    assert np.array_equal(np.asarray(mask.dataobj), image > THRESHOLD)


@pytest.mark.parametrize(("values", "dtype"), [((0, 4), np.uint8), ((0, 2000), np.uint16)])
def test_the_mask_has_the_values_of_the_labels(values, dtype, thresholding, tmp_path):
    run = untrained_run(tmp_path / "run", label_values=values)
    write_nifti(tmp_path / "scan.nii.gz", scan(), LPS)
    segmentation = Predictor(run).predict(tmp_path / "scan.nii.gz")
    assert np.array_equal(segmentation.classes, scan() > THRESHOLD)
    segmentation.save(tmp_path / "mask.nii.gz")
    mask = nibabel.load(tmp_path / "mask.nii.gz")
    assert mask.get_data_dtype() == dtype
    assert np.array_equal(np.asarray(mask.dataobj), np.where(scan() > THRESHOLD, values[1], 0))


def test_the_network_sees_the_axes_of_its_training(monkeypatch, tmp_path):
    """The intensity is the height in mm, so it grows along the first axis of a network trained on SPL."""
    seen = []

    def growing(method, windows, head="linear"):
        seen.append(torch.diff(windows, dim=2))
        return torch.cat([windows, windows], dim=1)

    monkeypatch.setattr(Method, "probabilities", growing)
    run = untrained_run(tmp_path / "run", preprocessing=Preprocessing("SPL", None, AS_STORED))
    affine = np.diag([1.0, 1.0, -2.0, 1.0])  # the third axis of the file leads down
    heights = np.broadcast_to(100 - 2.0 * np.arange(40), (16, 32, 40))
    Predictor(run).predict(Volume(WHERE, heights, affine))
    assert seen and all((rise == 2).all() for rise in seen)


def test_a_ball_keeps_its_place_and_size_through_resampling(thresholding, tmp_path):
    """A scan of 3 × 0.8 × 1.2 mm for a network of 1 mm; what is near the threshold may fall either way."""
    affine, shape = oblique(), (14, 45, 35)
    voxels = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), axis=-1)
    world = voxels @ affine[:3, :3].T + affine[:3, 3]
    centre = np.array([6, 20, 17]) @ affine[:3, :3].T + affine[:3, 3]
    image = 100.0 - 5 * np.linalg.norm(world - centre, axis=-1)  # 50 at 10 mm
    run = untrained_run(
        tmp_path / "run", preprocessing=Preprocessing("LPS", (1.0, 1.0, 1.0), AS_STORED)
    )
    with pytest.warns(UserWarning, match=r"3 × 0.8 × 1.2|0.8 × 1.2 × 3|are resampled"):
        result = Predictor(run).predict(Volume(WHERE, image, affine), probabilities=True)
    clear = abs(image - THRESHOLD) > 5  # 1 mm
    assert np.array_equal(result.classes[clear], (image > THRESHOLD)[clear])
    assert abs(result.classes.sum() / (image > THRESHOLD).sum() - 1) < 0.03
    assert result.probabilities.shape == (*shape, 2)
    np.testing.assert_allclose(result.probabilities.sum(-1), 1, atol=1e-6)
    assert np.array_equal(result.probabilities.argmax(-1), result.classes)


@pytest.mark.parametrize("steps", [(0.6, 1.7, 1.0), (2.3, 0.4, 0.9), (1.04, 1.0, 1.0)])
@pytest.mark.parametrize("thickness", [1, 4, 11])
def test_resampled_slabs_equal_interpolation_of_the_whole(steps, thickness):
    whole = torch.randn(3, 11, 8, 9)
    shape = tuple(round(side / step) for side, step in zip(whole.shape[1:], steps, strict=True))
    slabs = (slab.clone() for slab in whole.split(thickness, dim=1))
    result = torch.cat(list(resampled_slabs(slabs, whole.shape[1:], shape, steps)), dim=1)
    points = np.meshgrid(
        *((np.arange(side) + 0.5) * step - 0.5 for side, step in zip(shape, steps, strict=True)),
        indexing="ij",
    )
    expected = [ndimage.map_coordinates(one.numpy(), points, order=1, mode="nearest") for one in whole]
    np.testing.assert_allclose(result.numpy(), np.stack(expected), atol=1e-5)


def test_nrrd_and_dicom_scans(thresholding, tmp_path):
    image = np.rint(scan((24, 20, 12)))
    run = str(untrained_run(tmp_path / "run"))
    write_nrrd(tmp_path / "scans" / "one.nrrd", image, 0.625)
    for folder in ("series", "scans/two", "scans/three"):
        write_dicom_series(tmp_path / folder / "study", image, (0.5, 0.7, 2.0))
    (tmp_path / "enhanced").mkdir()
    enhanced_image(read_slices(tmp_path / "series" / "study")).save_as(tmp_path / "enhanced" / "a.dcm")
    for source in ("scans", "series", "series/study", "enhanced"):
        predict(["--run", run, "--input", str(tmp_path / source), "--output", str(tmp_path / "masks")])
    series = LPS @ np.array([[0.5, 0, 0, -100], [0, 0.7, 0, -80], [0, 0, 2, 30], [0, 0, 0, 1]])
    affines = {"one": LPS @ np.diag([0.625, 0.625, 0.625, 1])}
    for name, affine in (affines | dict.fromkeys(("two", "three", "series", "study", "enhanced"), series)).items():
        mask = read_nifti(tmp_path / "masks" / f"{name}.nii.gz")
        np.testing.assert_allclose(mask.affine, affine, atol=1e-5)
        assert np.array_equal(mask.values, image > THRESHOLD)


@pytest.mark.parametrize(
    "configuration, overrides",
    [
        ("phantom_supervised", ()),
        ("phantom_mper", ("evaluation.head=mean",)),
        ("phantom_mper", ("evaluation.head=prototype",)),
        ("phantom_vclipseg", ()),
        ("acdc_supervised", ()),
        ("acdc_supervised", ("evaluation.stride=[16, 24]",)),
        ("phantom_supervised", ("training.precision=bfloat16",)),
    ],
)
def test_every_method(configuration, overrides, tmp_path):
    """The same classes as evaluation has on the image prepared by hand; float32 probabilities beside them."""
    affine = np.diag([-1.0, -1.0, 1.0, 1.0])
    preprocessing = Preprocessing("SPL", None)
    run = str(untrained_run(tmp_path / "run", configuration, preprocessing, ("background", "a", "b")))
    image = scan((35, 40, 18))
    write_nifti(tmp_path / "scan.nii", image, affine)
    arguments = [
        "--run",
        run,
        "--input",
        str(tmp_path / "scan.nii"),
        "--output",
        str(tmp_path / "mask.nii.gz"),
    ]
    predict([*arguments, "--probabilities", *overrides])
    mask = read_nifti(tmp_path / "mask.nii.gz").values
    probabilities = np.asarray(nibabel.load(tmp_path / "mask_probabilities.nii.gz").dataobj)
    assert probabilities.shape == (*image.shape, 3) and probabilities.dtype == np.float32
    np.testing.assert_allclose(probabilities.sum(-1), 1, atol=1e-2 if "bfloat16" in str(overrides) else 1e-5)
    assert np.array_equal(probabilities.argmax(-1), mask)

    predictor = Predictor(run, overrides)
    prepared = ((image - image.mean()) / image.std()).transpose(2, 1, 0)
    expected = predict_case(
        fold_batch_norm(predictor.method), prepared[None], predictor.config, torch.device("cpu")
    )
    assert np.count_nonzero(expected.transpose(2, 1, 0) != mask) < 0.001 * mask.size
    assert np.unique(mask).size > 1


def test_three_lines_of_python_and_a_true_spacing(thresholding, tmp_path):
    """A header of 1 mm where 0.625 is meant; the mask still gets the header's affine, to lie on the scan."""
    image = scan()
    run = untrained_run(
        tmp_path / "run", preprocessing=Preprocessing(None, (0.625, 0.625, 0.625), AS_STORED)
    )
    write_nrrd(tmp_path / "scan.nrrd", image, 1.0)
    predictor = Predictor(run)
    predictor.predict(tmp_path / "scan.nrrd", spacing=(0.625, 0.625, 0.625)).save(tmp_path / "mask.nii.gz")
    mask = read_nifti(tmp_path / "mask.nii.gz")
    assert np.array_equal(mask.values, image > THRESHOLD)
    np.testing.assert_allclose(mask.affine, LPS)
    for wrong in ((1.0, 1.0), (0.0, 1.0, 1.0)):
        with pytest.raises(ValueError, match="three positive numbers"):
            predictor.predict(tmp_path / "scan.nrrd", spacing=wrong)


def test_a_true_spacing_leaves_a_scan_at_45_degrees_as_it_lies(thresholding, tmp_path):
    """Its axes may be called by either name, and another spacing's rounding may choose the other."""
    a, b = np.cos(np.pi / 4), np.sin(np.pi / 4)  # a last digit apart
    random, turn = np.random.default_rng(0), np.array([[b, a, 0], [0, 0, 1], [a, -b, 0]])
    for _ in range(1000):
        header, true = random.uniform(0.3, 3, (2, 3))
        affine = np.eye(4)
        affine[:3, :3] = turn * header
        sizes = Volume(WHERE, scan(), affine).spacing  # the header's but for rounding
        if (io_orientation(affine) != io_orientation(from_matvec(affine[:3, :3] * np.divide(true, sizes)))).any():
            break
    predictor = Predictor(
        untrained_run(tmp_path / "run", preprocessing=Preprocessing("LPS", None, AS_STORED))
    )
    image = scan((40, 37, 34))
    classes = predictor.predict(Volume(WHERE, image, affine), spacing=tuple(true)).classes
    assert np.array_equal(classes, image > THRESHOLD)


def test_only_the_largest_component(thresholding, tmp_path):
    image = np.zeros((36, 36, 20))
    image[2:5, 2:5, 2:5] = image[10:30, 10:30, 5:15] = 100
    run = untrained_run(tmp_path / "run")
    volume = Volume(WHERE, image, np.eye(4))
    assert np.array_equal(Predictor(run).predict(volume).classes, image > 0)
    image_kept = image.copy()
    image_kept[2:5, 2:5, 2:5] = 0
    kept = Predictor(run, ["evaluation.largest_component=true"]).predict(volume).classes
    assert np.array_equal(kept, image_kept > 0)


def test_doubtful_scans_are_warned_of(thresholding, tmp_path):
    run = untrained_run(
        tmp_path / "run", preprocessing=Preprocessing(None, (0.625, 0.625, 0.625), AS_STORED)
    )
    predictor = Predictor(run)
    with pytest.warns(
        UserWarning, match=r"scan: voxels of 1 × 1 × 1 mm are resampled to .* 0.625 × 0.625 × 0.625 mm"
    ):
        predictor.predict(Volume(WHERE, scan(), np.eye(4)))
    with pytest.warns(UserWarning, match=r"scan: 32 × 20 × 16 voxels .* fewer than a patch, 32 × 32 × 16"):
        predictor.predict(Volume(WHERE, scan((32, 20, 16)), np.diag([0.625, 0.625, 0.625, 1])))


def test_the_command_warns_in_one_line(thresholding, tmp_path, capsys):
    run = untrained_run(tmp_path / "run")
    write_nifti(tmp_path / "scan.nii.gz", scan((20, 32, 16)), LPS)
    predict(
        ["--run", str(run), "--input", str(tmp_path / "scan.nii.gz"), "--output", str(tmp_path / "masks")]
    )
    (line,) = (line for line in capsys.readouterr().err.splitlines() if "warning" in line)
    assert line.strip().endswith(
        "scan.nii.gz: 20 × 32 × 16 voxels at the training's spacing are fewer than a patch, 32 × 32 × 16; "
        "the rest is filled with zeros"
    )


@pytest.mark.filterwarnings("error")
def test_a_scan_like_the_training_is_not_warned_of(thresholding, tmp_path):
    run = untrained_run(
        tmp_path / "run", preprocessing=Preprocessing(None, (0.625, 0.625, 0.625), AS_STORED)
    )
    Predictor(run).predict(Volume(WHERE, scan((36, 36, 16)), np.diag([0.7, 0.6, 0.65, 1])))


def test_a_folder_goes_on_after_a_bad_scan_and_says_so(thresholding, tmp_path, capsys):
    run = str(untrained_run(tmp_path / "run"))
    image = scan((32, 32, 16))
    for name in ("a", "b", "c"):
        write_nifti(tmp_path / "scans" / f"{name}.nii.gz", image, LPS)
    holed = image.copy()
    holed[3, 3, 3] = np.nan
    write_nifti(tmp_path / "scans" / "b.nii.gz", holed, LPS)
    arguments = ["--run", run, "--input", str(tmp_path / "scans"), "--output", str(tmp_path / "masks")]
    with pytest.raises(ValueError, match="1 of 3 scans have no mask: b.nii.gz"):
        predict(arguments)
    assert "error: " in capsys.readouterr().err
    assert sorted(path.name for path in (tmp_path / "masks").iterdir()) == ["a.nii.gz", "c.nii.gz"]
    with pytest.raises(ValueError, match=r"a.nii.gz exists already \(and 1 more\)"):
        predict(arguments)
    written = {path.name: path.read_bytes() for path in (tmp_path / "masks").iterdir()}
    write_nifti(tmp_path / "scans" / "b.nii.gz", image, LPS)
    predict([*arguments, "--skip-existing"])
    predict([*arguments, "--skip-existing"])
    said = capsys.readouterr().out.splitlines()
    assert said == [
        "2 of 3 scans have a mask already", f"written to {tmp_path}/masks/b.nii.gz", "3 of 3 scans have a mask already"
    ]  # fmt: skip
    assert all((tmp_path / "masks" / name).read_bytes() == content for name, content in written.items())


def test_hidden_files_of_a_folder_are_no_scans(tmp_path):
    """Such as those that macOS puts beside each file."""
    for name in ("b.nii.gz", "._a.nii.gz", "a.nrrd", "notes.txt"):
        (tmp_path / name).write_text("never read")
    (tmp_path / "._slice.dcm").write_text("never read")
    assert find_scans(tmp_path) == [tmp_path / "a.nrrd", tmp_path / "b.nii.gz"]


def test_a_scan_is_never_written_over(tmp_path):
    write_nifti(tmp_path / "a.nii.gz", scan((32, 32, 16)), LPS)
    content = (tmp_path / "a.nii.gz").read_bytes()
    run = str(untrained_run(tmp_path / "run"))
    arguments = ["--run", run, "--input", str(tmp_path), "--output", str(tmp_path)]
    for options in ([], ["--skip-existing"]):
        with pytest.raises(ValueError, match="a.nii.gz would be written over the scan"):
            predict([*arguments, *options])
    assert (tmp_path / "a.nii.gz").read_bytes() == content


@pytest.mark.parametrize("source", [".", "link"])
def test_a_scan_is_known_by_another_name_of_its_folder(source, monkeypatch, tmp_path):
    folder, run = tmp_path / "scans", str(untrained_run(tmp_path / "run"))
    write_nifti(folder / "a.nii.gz", scan((32, 32, 16)), LPS)
    (folder / "link").symlink_to(folder)
    monkeypatch.chdir(folder)
    with pytest.raises(ValueError, match="scans/a.nii.gz would be written over the scan"):
        predict(["--run", run, "--input", source, "--output", str(folder), "--skip-existing"])


def test_masks_may_be_links_to_the_same_file(tmp_path, capsys):
    """Such as those of tools that keep equal files once; a mask replaces the link."""
    (tmp_path / "masks").mkdir()
    (tmp_path / "kept").write_text("never read")
    for name in ("a.nii.gz", "b.nii.gz"):
        write_nifti(tmp_path / "scans" / name, scan((32, 32, 16)), LPS)
        (tmp_path / "masks" / name).symlink_to(tmp_path / "kept")
    run, source, output = (str(tmp_path / name) for name in ("run", "scans", "masks"))
    untrained_run(tmp_path / "run")
    predict(["--run", run, "--input", source, "--output", output, "--skip-existing"])
    assert capsys.readouterr().out == "2 of 2 scans have a mask already\n"


def test_the_command_restarts_before_it_checks(monkeypatch, tmp_path):
    class Restarted(Exception):
        pass

    def restart():
        raise Restarted

    arguments = ["--run", "none", "--input", str(tmp_path / "no.nii"), "--output", str(tmp_path / "mask.nii")]
    monkeypatch.setattr("semiseg.predict.restart_with_tuned_heap", restart)
    monkeypatch.setattr("semiseg.predict.choose_device", lambda name: torch.device("cpu"))
    monkeypatch.setattr(sys, "argv", ["predict", *arguments])
    with pytest.raises(Restarted):
        predict()
    monkeypatch.setattr("semiseg.predict.choose_device", lambda name: torch.device("cuda"))
    with pytest.raises(FileNotFoundError, match="no.nii: missing"):
        predict()


def test_one_segmentation_is_in_memory_at_a_time(thresholding, monkeypatch, tmp_path):
    for name in ("a", "b"):
        write_nifti(tmp_path / "scans" / f"{name}.nii.gz", scan((32, 32, 16)), LPS)
    segment, made = Predictor.predict, []

    def recorded(*arguments, **options):
        assert not any(one() for one in made)
        segmentation = segment(*arguments, **options)
        made.append(weakref.ref(segmentation))
        return segmentation

    monkeypatch.setattr(Predictor, "predict", recorded)
    run, source, output = (str(tmp_path / name) for name in ("run", "scans", "masks"))
    untrained_run(tmp_path / "run")
    predict(["--run", run, "--input", source, "--output", output, "--probabilities"])
    assert len(made) == 2


def test_a_mask_of_a_volume_is_no_picture(thresholding, tmp_path):
    segmentation = Predictor(untrained_run(tmp_path / "run")).predict(Volume(WHERE, scan(), np.eye(4)))
    with pytest.raises(ValueError, match=r"mask.png: accepted for a mask of .* slices are .nii.gz, .nii, .mha"):
        segmentation.save(tmp_path / "mask.png")
    assert not (tmp_path / "mask.png").exists()


def test_headers_are_checked_before_the_first_scan_is_predicted(thresholding, tmp_path):
    run = str(untrained_run(tmp_path / "run"))
    write_nifti(tmp_path / "scans" / "a.nii.gz", scan((32, 32, 16)), LPS)
    write_nifti(tmp_path / "scans" / "b.nii.gz", np.zeros((4, 4, 4, 3), np.float32), LPS)
    arguments = ["--run", run, "--input", str(tmp_path / "scans"), "--output", str(tmp_path / "masks")]
    with pytest.raises(ValueError, match=r"b.nii.gz: the number of channels is 3, accepted is that of the training, 1"):
        predict(arguments)
    (tmp_path / "scans" / "b.nii.gz").unlink()
    (tmp_path / "scans" / "b.nrrd").write_bytes(b"NRRD0004\n")
    with pytest.raises(ValueError, match=r"b.nrrd: cannot be read as NRRD"):
        predict(arguments)
    (tmp_path / "scans" / "b.nrrd").unlink()
    for slices in (16, 1):  # the second replaces one file of the first
        write_dicom_series(tmp_path / "scans" / "c", scan((32, 32, slices)), (1, 1, 1))
    with pytest.raises(ValueError, match=r"c: holds 2 DICOM series"):
        predict(arguments)
    shutil.rmtree(tmp_path / "scans" / "c")
    write_nrrd(tmp_path / "scans" / "a.nrrd", scan((32, 32, 16)))
    with pytest.raises(ValueError, match="a.nii.gz would be written for two scans"):
        predict(arguments)
    assert not (tmp_path / "masks").exists()


def bad_inputs(folder: Path) -> dict[str, tuple[Path, str]]:
    """What is wrong -> the input and what the message says."""
    image = scan((32, 32, 16))
    write_nifti(folder / "whole.nii.gz", image, LPS)
    (folder / "truncated.nii.gz").write_bytes((folder / "whole.nii.gz").read_bytes()[:-2000])
    (folder / "text.nii.gz").write_text("no scan")
    (folder / "notes.txt").write_text("no scan")
    (folder / "empty").mkdir()
    write_nifti(folder / "constant.nii.gz", np.full((32, 32, 16), 3.0), LPS)
    colours = np.zeros((8, 8, 8), [("R", "u1"), ("G", "u1"), ("B", "u1")])
    write_nifti(folder / "colours.nii.gz", colours, LPS)
    for name in ("one", "two"):
        write_dicom_series(folder / "patient" / "study" / name, image, (1, 1, 1))
    write_dicom_series(folder / "mixed", image, (1, 1, 1))
    write_nifti(folder / "mixed" / "a.nii.gz", image, LPS)
    return {
        "missing": (folder / "nothing.nii.gz", "nothing.nii.gz: missing"),
        "truncated": (folder / "truncated.nii.gz", "truncated.nii.gz: cannot be read as NIfTI"),
        "text": (folder / "text.nii.gz", "text.nii.gz: cannot be read as NIfTI"),
        "another kind": (folder / "notes.txt", "notes.txt: accepted are files that end in .nii.gz"),
        "empty folder": (folder / "empty", "empty: holds no scan"),
        "constant": (folder / "constant.nii.gz", "constant.nii.gz: the scan is 3.0 everywhere"),
        "colours": (folder / "colours.nii.gz", "colours.nii.gz: holds values of type"),
        "two series": (folder / "patient", "patient: holds 2 DICOM series"),
        "two kinds": (folder / "mixed", "000.dcm: lies in the folder of all scans; expected a folder for every DICOM series"),
    }


def test_bad_input_is_named(tmp_path):
    run = str(untrained_run(tmp_path / "run", preprocessing=Preprocessing(None, None)))
    for what, (source, message) in bad_inputs(tmp_path).items():
        with pytest.raises((ValueError, OSError)) as raised:
            predict(["--run", run, "--input", str(source), "--output", str(tmp_path / "out")])
        assert message in str(raised.value) and "\n" not in str(raised.value), what
    assert not any((tmp_path / "out").iterdir())


def test_bad_runs_and_outputs_are_named(tmp_path):
    run = untrained_run(tmp_path / "run", "phantom_vclipseg")
    write_nifti(tmp_path / "scan.nii.gz", scan((32, 32, 16)), LPS)
    (tmp_path / "scans").mkdir()
    write_nifti(tmp_path / "scans" / "a.nii.gz", scan((32, 32, 16)), LPS)

    def refused(message, source="scan.nii.gz", output="mask.nii.gz", run=run, overrides=()):
        arguments = ["--run", str(run), "--input", str(tmp_path / source), "--output", str(tmp_path / output)]
        with pytest.raises((ValueError, OSError)) as raised:
            predict([*arguments, *overrides])
        assert message in str(raised.value) and "\n" not in str(raised.value)

    refused("nowhere is no run directory", run=tmp_path / "nowhere")
    refused("accepted for a run that exists are keys of evaluation, training.precision", overrides=["seed=1"])
    refused("are keys of evaluation, training.precision, training.device", overrides=["training.learning_rate=1"])
    refused("evaluation.head is 'mean'", overrides=["evaluation.head=mean"])
    refused("validation.safetensors does not exist", overrides=["evaluation.select=validation"])
    refused("scan.nii.gz would be written over the scan", output="scan.nii.gz")
    refused("accepted for a folder of scans is a folder", source="scans")
    (tmp_path / "mask.jpg").write_text("a picture")
    refused("mask.jpg: accepted are files that end in .nii.gz, .nii, .mha, .png", output="mask.jpg")
    (run / "text.safetensors").rename(tmp_path / "text.safetensors")
    refused("text.safetensors is missing")
    (tmp_path / "text.safetensors").rename(run / "text.safetensors")
    checkpoint = run / "last.safetensors"
    whole = checkpoint.read_bytes()
    checkpoint.write_bytes(whole[: len(whole) // 2])
    refused("last.safetensors is damaged")
    (run / "dataset.json").unlink()
    refused("dataset.json: missing")
    checkpoint.unlink()
    refused("run is unfinished")


def test_the_command_ends_in_one_line_and_status_2(tmp_path, capsys):
    with pytest.raises(SystemExit) as raised:
        main(["--run", "no", "--input", str(tmp_path / "no.nii"), "--output", str(tmp_path / "mask.nii")])
    assert raised.value.code == 2
    assert capsys.readouterr().err == f"error: {tmp_path}/no.nii: missing; expected a scan or a folder\n"


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate\nmuch"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate much"),
        MemoryError("Unable to allocate much"),
    ],
    ids=["CUDA", "CPU", "NumPy"],
)
@pytest.mark.parametrize(
    ("batch", "advice"), [(4, "; less is taken by an evaluation.batch below 4"), (1, "")], ids=["four", "one"]
)
def test_too_little_memory_names_the_scan_and_the_batch(error, batch, advice, monkeypatch, tmp_path):
    def exhausted(method, windows, head="linear"):
        raise error

    monkeypatch.setattr(Method, "probabilities", exhausted)
    predictor = Predictor(untrained_run(tmp_path / "run"), [f"evaluation.batch={batch}"])
    with pytest.raises(ValueError, match=rf"scan: out of memory on cpu \(.* allocate.*\){advice}$"):
        predictor.predict(Volume(WHERE, scan(), np.eye(4)))


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("[enforce fail] can't allocate memory"),
        torch.OutOfMemoryError("out of memory"),
    ],
)
def test_every_command_says_what_takes_less_memory(error, capsys):
    @command
    def exhausted(arguments):
        raise error

    with pytest.raises(SystemExit) as raised:
        exhausted([])
    assert raised.value.code == 2
    assert re.fullmatch(r"error: out of memory \(.+\); .*training.patch_size.*\n", capsys.readouterr().err)


def test_a_defect_keeps_its_traceback():
    @command
    def defective(arguments):
        raise RuntimeError("expected scalar type Float")

    with pytest.raises(RuntimeError, match="expected scalar type"):
        defective([])


def test_a_folder_goes_on_after_a_scan_that_memory_cannot_hold(thresholding, tmp_path, capsys, monkeypatch):
    """Voxels of 100 mm, which a header only says by mistake: the warning comes before the refusal."""
    monkeypatch.setattr("semiseg.preparation.volume.machine_memory", lambda: 2**30)
    run = untrained_run(
        tmp_path / "run", preprocessing=Preprocessing("RAS", (1.0, 1.0, 1.0), AS_STORED)
    )
    for name, size in (("a", 1.0), ("b", 100.0), ("c", 1.0)):
        write_nifti(
            tmp_path / "scans" / f"{name}.nii.gz", scan((32, 32, 16)), np.diag([size, size, size, 1.0])
        )
    with pytest.raises(ValueError, match="1 of 3 scans have no mask: b.nii.gz"):
        predict(["--run", str(run), "--input", str(tmp_path / "scans"), "--output", str(tmp_path / "masks")])
    assert sorted(path.name for path in (tmp_path / "masks").iterdir()) == ["a.nii.gz", "c.nii.gz"]
    warning, error = (line for line in capsys.readouterr().err.splitlines() if "b.nii.gz: " in line)
    assert "if the header is wrong, give the true size as spacing" in warning
    assert re.search(r"error: .*voxels of 100 × 100 × 100 mm are 3200 × 3200 × 1600 of .* GB", error)


def test_endings_in_large_letters(thresholding, tmp_path):
    image, run = scan((32, 32, 16)), str(untrained_run(tmp_path / "run"))
    for name in ("a.NII.GZ", "b.Nii"):
        write_nifti(tmp_path / name.lower(), image, LPS)
        (tmp_path / "scans").mkdir(exist_ok=True)
        (tmp_path / name.lower()).rename(tmp_path / "scans" / name)
    predict(["--run", run, "--input", str(tmp_path / "scans"), "--output", str(tmp_path / "masks")])
    assert sorted(path.name for path in (tmp_path / "masks").iterdir()) == ["a.nii.gz", "b.nii.gz"]
    source, mask = str(tmp_path / "scans" / "b.Nii"), tmp_path / "MASK.NII.GZ"
    predict(["--run", run, "--input", source, "--output", str(mask)])
    assert mask.read_bytes()[:2] == b"\x1f\x8b" and np.array_equal(read_nifti(mask).values, image > THRESHOLD)


def test_bad_names_and_destinations_are_refused_before_the_network_is_read(monkeypatch, tmp_path):
    run = str(untrained_run(tmp_path / "run"))
    monkeypatch.setattr("semiseg.predict.Predictor", None)
    monkeypatch.setattr("semiseg.predict.read_channel_headers", None)

    def refused(message, output, name="scan.nii.gz"):
        (tmp_path / name).write_text("never read")
        with pytest.raises((ValueError, OSError), match=message):
            predict(["--run", run, "--input", str(tmp_path / name), "--output", str(tmp_path / output)])
        (tmp_path / name).unlink()

    for output in ("mask.nrrd", "mask.jpg", "mask.gz"):
        refused(rf"{output}: accepted are files that end in .nii.gz, .nii, .mha, .png, folders", output)
    refused(r"'.*M\\udcfcller.nii': accepted are names in UTF-8", "masks", os.fsdecode(b"M\xfcller.nii"))
    (tmp_path / "afile").write_text("precious")
    refused("afile/masks/scan.nii.gz: cannot be written, as .*afile is no folder", "afile/masks")
    (tmp_path / "scans").mkdir()
    for name in ("a.nii", f"{'b' * 251}.nii"):
        (tmp_path / "scans" / name).write_text("never read")
    with pytest.raises(ValueError, match="b.nii.gz: accepted are names of up to 255 bytes"):
        predict(["--run", run, "--input", str(tmp_path / "scans"), "--output", str(tmp_path / "masks")])
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write everywhere
    refused("mask.nii: cannot be written, as the folder .* is not writable", "mask.nii")


@pytest.mark.parametrize("size", ["0", "-1", "nan", "inf"])
def test_an_impossible_spacing_is_refused_before_any_scan_is_read(size, monkeypatch, tmp_path):
    monkeypatch.setattr("semiseg.predict.find_scans", None)
    with pytest.raises(ValueError, match=r"spacing is \(1.0, .*, accepted are three positive numbers of mm"):
        predict(["--run", "run", "--input", "scans", "--output", str(tmp_path), "--spacing", "1", size, "1"])


def test_a_folder_may_have_a_dot_in_its_name(thresholding, tmp_path):
    run = str(untrained_run(tmp_path / "run"))
    write_nifti(tmp_path / "scans" / "a.nii.gz", scan((32, 32, 16)), LPS)
    (tmp_path / "masks.v2").mkdir()
    for source, output in ((tmp_path / "scans", "masks.v1"), (tmp_path / "scans" / "a.nii.gz", "masks.v2")):
        predict(["--run", run, "--input", str(source), "--output", str(tmp_path / output)])
        assert (tmp_path / output / "a.nii.gz").is_file()


def test_a_network_of_standardised_crops_is_warned_of(tmp_path):
    standardised = Preprocessing("LPS", (1.0, 1.0, 1.0), (Intensity(clip=(-125.0, 275.0)),))
    fixed = replace(standardised, channels=(Intensity("fixed", (-125.0, 275.0), 30.0, 80.0),))
    overrides = ("dataset.name=pancreas", "dataset.root=/nowhere")
    with pytest.warns(
        UserWarning, match="cropped around the organ before their intensities were standardised"
    ):
        Predictor(untrained_run(tmp_path / "run", preprocessing=standardised, overrides=overrides))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Predictor(untrained_run(tmp_path / "other", preprocessing=fixed, overrides=overrides))


MEMORY = """
import resource, sys
from pathlib import Path
import numpy as np
import torch
from semiseg import Predictor
from semiseg.methods import Method
from semiseg.preparation.volume import Volume

Method.probabilities = lambda method, windows, head: windows.expand(-1, 48, -1, -1, -1)
predictor = Predictor(sys.argv[1])
image = np.random.default_rng(0).random((900, 48, 48), np.float32)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
result = predictor.predict(Volume(Path("scan"), image, np.diag([1.5, 1.5, 1.5, 1])))
assert result.classes.shape == image.shape
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


def test_memory_does_not_hold_every_class_of_every_voxel(tmp_path):
    """48 classes on 900 planes, resampled on the way in and back."""
    classes = tuple(f"class {number}" for number in range(48))
    preprocessing = Preprocessing("LPS", (1.6, 1.5, 1.5), AS_STORED)
    run = untrained_run(
        tmp_path / "run", "phantom_supervised", preprocessing, classes, ("evaluation.stride=[32, 32, 16]",)
    )
    line = [sys.executable, "-c", MEMORY, str(run)]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 48 * 900 * 48 * 48 * 4 / 2


def test_importing_the_package_is_light():
    subprocess.run(
        [sys.executable, "-c", "import sys, semiseg; assert 'torch' not in sys.modules"], check=True
    )
