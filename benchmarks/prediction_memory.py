"""Peak memory of predicting a whole scan with the LA network: python benchmarks/prediction_memory.py FILE

The scan is noise of 512 x 512 x 300 voxels in int16 and the weights are random: memory depends on sizes alone. Windows do
not overlap, which saves time and no memory: sums, patch and batch are the same for every stride.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import nibabel
import numpy as np
import torch
from results_file import write_results

from semiseg.config import load_config
from semiseg.data.description import DatasetDescription
from semiseg.data.left_atrium import LeftAtrium
from semiseg.engine.checkpoint import save_checkpoint
from semiseg.engine.run_directory import RunDirectory
from semiseg.engine.trainer import build_method

SHAPE = (512, 512, 300)  # voxels
CONFIGURATION = "la_mper"


def untrained_run(folder: Path) -> RunDirectory:
    """What training would leave."""
    config = load_config(CONFIGURATION, [f"output={folder}"])
    run = RunDirectory.create(config, torch.device("cpu"))
    dataset = LeftAtrium(folder)
    DatasetDescription.of(dataset).save(run.dataset)
    method = build_method(config, len(dataset.class_names), torch.device("cpu"))
    save_checkpoint(run.checkpoint(), method, iteration=0)
    return run


def peak_gigabytes(folder: Path) -> float:
    """Peak resident memory of `python -m semiseg.predict` in a process of its own."""
    run = untrained_run(folder / "run")
    values = np.random.default_rng(0).integers(0, 300, SHAPE, dtype=np.int16)
    spacing = LeftAtrium.spacing
    nibabel.save(nibabel.Nifti1Image(values, np.diag([*spacing, 1])), folder / "scan.nii.gz")
    patch = load_config(CONFIGURATION).training.patch_size
    command = [
        sys.executable, "-m", "semiseg.predict", "--run", str(run.path), "--input", str(folder / "scan.nii.gz"),
        "--output", str(folder / "mask.nii.gz"), f"evaluation.stride={list(patch)}",
    ]  # fmt: skip
    subprocess.run(command, check=True)
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024 / 1e9


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        row = {"configuration": CONFIGURATION, "shape": SHAPE, "peak_gb": peak_gigabytes(Path(folder))}
    write_results(options.file, [row])
