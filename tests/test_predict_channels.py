"""Prediction of scans of several channels: all of them found, in their order, and the mask on the grid of the first."""

import shutil
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from challenge_files import LPS, write_dicom_series, write_nifti
from untrained_runs import AS_STORED, untrained_run

from semiseg import Predictor
from semiseg.data.preprocessing import Preprocessing
from semiseg.methods import Method
from semiseg.predict import main
from semiseg.preparation.volume_files import read_nifti

predict = main.__wrapped__  # without the exit status
SHAPE = (36, 33, 18)


def brighter_second(method, windows, head="linear"):
    """A network whose answer is known: organ where the second channel is brighter than the first."""
    assert windows.shape[1] == 2
    organ = (windows[:, 1:] > windows[:, :1]).float()
    return torch.cat([1 - organ, organ], dim=1)


@pytest.fixture
def run(monkeypatch, tmp_path) -> str:
    monkeypatch.setattr(Method, "probabilities", brighter_second)
    preprocessing = Preprocessing("SPL", None, AS_STORED * 2)
    return str(untrained_run(tmp_path / "run", preprocessing=preprocessing))


@pytest.fixture
def scans(tmp_path) -> tuple[Path, dict[str, np.ndarray]]:
    """A folder of scans a, b, c, a file for each channel, and their channels [2, x, y, z]."""
    random = np.random.default_rng()
    channels = {name: random.normal(size=(2, *SHAPE)).astype(np.float32) for name in "abc"}
    for name, values in channels.items():
        for number, channel in enumerate(values):
            write_nifti(tmp_path / "scans" / f"{name}_000{number}.nii.gz", channel, LPS)
    return tmp_path / "scans", channels


def expected(channels: np.ndarray) -> np.ndarray:
    return channels[1] > channels[0]


def test_a_folder_of_scans(run, scans, tmp_path):
    folder, channels = scans
    predict(["--run", run, "--input", str(folder), "--output", str(tmp_path / "masks")])
    assert sorted(path.name for path in (tmp_path / "masks").iterdir()) == [f"{name}.nii.gz" for name in "abc"]
    for name, values in channels.items():
        mask = read_nifti(tmp_path / "masks" / f"{name}.nii.gz")
        np.testing.assert_array_equal(mask.values, expected(values))
        np.testing.assert_array_equal(mask.affine, LPS)


@pytest.mark.parametrize("given", ["b_0000.nii.gz", "b_0001.nii.gz"])
def test_of_one_file_the_others_lie_beside_it(given, run, scans, tmp_path):
    folder, channels = scans
    predict(["--run", run, "--input", str(folder / given), "--output", str(tmp_path / "mask.nii.gz")])
    np.testing.assert_array_equal(read_nifti(tmp_path / "mask.nii.gz").values, expected(channels["b"]))
    predict(["--run", run, "--input", str(folder / given), "--output", str(tmp_path / "masks")])
    assert [path.name for path in (tmp_path / "masks").iterdir()] == ["b.nii.gz"]


def test_files_that_hold_all_channels(run, scans, tmp_path):
    """Numbers behind their names are then those of scans."""
    (tmp_path / "whole").mkdir()
    for number, values in enumerate(scans[1].values()):
        image = nibabel.Nifti1Image(np.moveaxis(values, 0, -1), LPS)
        nibabel.save(image, tmp_path / "whole" / f"scan_000{number}.nii.gz")
    predict(["--run", run, "--input", str(tmp_path / "whole"), "--output", str(tmp_path / "masks")])
    for number, values in enumerate(scans[1].values()):
        mask = read_nifti(tmp_path / "masks" / f"scan_000{number}.nii.gz")
        np.testing.assert_array_equal(mask.values, expected(values))


def test_series_of_dicom(run, tmp_path):
    values = np.random.default_rng().integers(0, 500, (2, 33, 36, 18))
    for number, channel in enumerate(values):
        write_dicom_series(tmp_path / "scans" / f"a_000{number}", channel, (1.0, 1.0, 2.0), intercept=0)
    for source, mask in (("scans", "masks/a.nii.gz"), ("scans/a_0000", "masks2/a.nii.gz")):
        output = str((tmp_path / mask).parent)
        predict(["--run", run, "--input", str(tmp_path / source), "--output", output])
        np.testing.assert_array_equal(read_nifti(tmp_path / mask).values, expected(values))


def test_from_python_channels_come_in_the_order_given(run, scans):
    folder, channels = scans
    predictor, files = Predictor(run), [folder / "c_0000.nii.gz", folder / "c_0001.nii.gz"]
    np.testing.assert_array_equal(predictor.predict(files).classes, expected(channels["c"]))
    np.testing.assert_array_equal(predictor.predict(files[::-1]).classes, expected(channels["c"][::-1]))
    volumes = [read_nifti(file) for file in files]
    np.testing.assert_array_equal(predictor.predict(volumes).classes, expected(channels["c"]))
    with pytest.raises(ValueError, match="c_0000.nii.gz: the number of channels is 1, accepted is that of the training, 2"):
        predictor.predict(files[0])


def test_scans_that_lack_a_channel_are_refused_before_the_network_is_read(run, scans, tmp_path, monkeypatch):
    monkeypatch.setattr("semiseg.predict.Predictor", None)
    folder, _ = scans

    def refused(message: str, source: Path = folder) -> None:
        with pytest.raises(ValueError, match=message):
            predict(["--run", run, "--input", str(source), "--output", str(tmp_path / "masks")])

    shutil.copy(folder / "a_0000.nii.gz", folder / "a_0002.nii.gz")
    refused("b_0000.nii.gz: the channels of b are _0000, _0001; expected _0000, _0001, _0002 of every scan")
    refused("a_0000.nii.gz: the number of channels is 3, accepted is that of the training, 2", folder / "a_0000.nii.gz")
    (folder / "a_0002.nii.gz").unlink()
    (folder / "b_0001.nii.gz").unlink()
    refused("b_0000.nii.gz: the channels of b are _0000; expected _0000, _0001 of every scan")
    refused("b_0000.nii.gz: the number of channels is 1, accepted is that of the training, 2", folder / "b_0000.nii.gz")
    (folder / "b_0000.nii.gz").rename(folder / "b.nii.gz")
    message = "b.nii.gz: the number of channels is 1, accepted are files that all hold 2, or one each and are called NAME_0000"
    refused(message)
    refused(message, folder / "b.nii.gz")


def test_nan_in_any_channel_is_refused(run, scans, tmp_path):
    folder, channels = scans
    channels["a"][1, 3, 4, 5] = np.nan
    write_nifti(folder / "a_0001.nii.gz", channels["a"][1], LPS)
    with pytest.raises(ValueError, match="a_0001.nii.gz: holds NaN"):
        predict(["--run", run, "--input", str(folder / "a_0000.nii.gz"), "--output", str(tmp_path / "masks")])


def test_a_run_of_one_channel_takes_files_one_by_one(scans, tmp_path):
    run = str(untrained_run(tmp_path / "run"))
    predict(["--run", run, "--input", str(scans[0]), "--output", str(tmp_path / "masks")])
    assert len(list((tmp_path / "masks").iterdir())) == 6
    image = nibabel.Nifti1Image(np.moveaxis(scans[1]["a"], 0, -1), LPS)
    nibabel.save(image, tmp_path / "whole.nii.gz")
    with pytest.raises(ValueError, match="whole.nii.gz: the number of channels is 2, accepted is that of the training, 1"):
        predict(["--run", run, "--input", str(tmp_path / "whole.nii.gz"), "--output", str(tmp_path / "mask.nii.gz")])
