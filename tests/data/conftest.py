import os
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
from h5_files import random_case, write_case

REAL_DATA = os.environ.get("SEMISEG_DATA", "")


@pytest.fixture
def real_data() -> Path:
    """The folder that holds LA and ACDC."""
    if not REAL_DATA:
        pytest.skip("SEMISEG_DATA is not set: it names the folder that holds LA and ACDC")
    return Path(REAL_DATA)


@pytest.fixture
def left_atrium(tmp_path: Path) -> Path:
    """A left atrium folder of 5 training and 2 test volumes."""
    random = np.random.default_rng(0)
    for number in range(7):
        shape = tuple(int(side) for side in random.integers(6, 12, 3))
        folder = tmp_path / "2018LA_Seg_Training Set" / f"CASE{number}"
        write_case(folder / "mri_norm2.h5", *random_case(random, shape, 2))
    (tmp_path / "train.list").write_text("CASE3\nCASE1\nCASE4\nCASE0\nCASE2\n")
    (tmp_path / "test.list").write_text("CASE5\nCASE6\n")
    return tmp_path


@pytest.fixture
def acdc(tmp_path: Path) -> Path:
    """An ACDC folder of 3 training patients with 4, 2 and 6 slices, 1 validation and 1 test patient."""
    random = np.random.default_rng(0)
    slices = []
    for patient, count in (("patient030", 2), ("patient002", 1), ("patient011", 3)):
        for frame in ("frame01", "frame02"):
            slices += [f"{patient}_{frame}_slice_{number}" for number in range(count, 0, -1)]
    for name in slices:
        write_case(tmp_path / "data" / "slices" / f"{name}.h5", *random_case(random, (10, 8), 4))
    for name in ("patient005_frame01", "patient005_frame02", "patient007_frame01", "patient007_frame02"):
        write_case(tmp_path / "data" / f"{name}.h5", *random_case(random, (3, 10, 8), 4))
    (tmp_path / "train_slices.list").write_text("\n".join(slices) + "\n")
    (tmp_path / "val.list").write_text("patient005_frame01\npatient005_frame02\n")
    (tmp_path / "test.list").write_text("patient007_frame01\npatient007_frame02\n")
    return tmp_path


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Paths of the HDF5 files opened so far."""
    paths: list[str] = []
    file: Callable = h5py.File

    def open_and_note(path, *arguments, **keywords):
        paths.append(str(path))
        return file(path, *arguments, **keywords)

    monkeypatch.setattr(h5py, "File", open_and_note)
    return paths
