"""What someone with scans of their own does from the first command to the last, through the commands alone."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import nibabel
import numpy as np
import pytest
from documents import example_with
from nifti_files import VALUES, own_source

METHODS = ("supervised", "mper")
SHORT = {
    "supervised": ["method.iterations=3"],
    "mper": ["method.pretraining_iterations=2", "method.iterations=2"],
}


@pytest.fixture(scope="module")
def day(tmp_path_factory):
    folder = tmp_path_factory.mktemp("day")
    own_source(folder)
    return folder


def semiseg(day: Path, verb: str, *arguments: str) -> str:
    """Run a command; return what it printed."""
    line = [sys.executable, "-m", f"semiseg.{verb}", *arguments]
    done = subprocess.run(line, capture_output=True, text=True, cwd=day, check=False)
    assert done.returncode == 0, f"{' '.join(line)}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.mark.slow
def test_a_whole_day(day):
    semiseg(
        day, "prepare", "nifti", "images", "labels", "prepared", "--classes", "chamber", "wall", "vessel"
    )
    assert "spacing 1.2 × 1 × 2.5 mm" in (day / "prepared" / "findings.md").read_text()

    for method in METHODS:
        semiseg(
            day, "train", "--config", f"prepared/{method}.yaml", f"output=runs/{method}",
            "network.filters=[2]", *SHORT[method],
        )  # fmt: skip
        results = json.loads((day / "runs" / method / "results.json").read_text())
        assert list(results["classes"]) == ["background", "chamber", "wall", "vessel"]
        assert results["summary"]["unit"] == "mm"
        assert "<h1" in (day / "runs" / method / "report.html").read_text()

    semiseg(day, "evaluate", "--run", "runs/mper", "evaluation.head=mean")
    assert json.loads((day / "runs" / "mper" / "results.json").read_text())["evaluation"]["head"] == "mean"

    semiseg(day, "predict", "--run", "runs/mper", "--input", "images", "--output", "masks")
    for scan in sorted((day / "images").iterdir()):
        image, mask = nibabel.load(scan), nibabel.load(day / "masks" / scan.name)
        assert mask.shape == image.shape
        assert np.allclose(mask.affine, image.affine)
        assert set(np.unique(np.asarray(mask.dataobj))) <= set(VALUES)  # of the labels

    shutil.copy(day / "images" / "scan_0.nii.gz", day / "scan.nii.gz")
    subprocess.run([sys.executable, "-c", example_with("Predictor")], cwd=day, check=True)
    assert nibabel.load(day / "mask.nii.gz").shape == nibabel.load(day / "scan.nii.gz").shape

    semiseg(day, "export", "--run", "runs/mper", "--output", "model.onnx")
    assert (day / "model.onnx").stat().st_size > 1000

    table = semiseg(day, "report", "runs/supervised", "runs/mper", "--output", "comparison.html")
    assert "mper" in table
    assert "supervised" in (day / "comparison.html").read_text()
