"""Preparing the made-up challenges, and what a preparation leaves."""

from pathlib import Path

import challenge_files as files
import h5py
import numpy as np
import pytest

from semiseg.prepare import main

SOURCES = {
    "la": files.left_atrium_source,
    "acdc": files.acdc_source,
    "pancreas": files.pancreas_source,
}
LEFT_ATRIUM_LABEL, PANCREAS_LABEL = "CASE1/laendo.nrrd", "labels/label0002.nii.gz"


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
