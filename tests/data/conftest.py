import os
from collections.abc import Callable
from pathlib import Path

import h5py
import pytest

REAL_DATA = os.environ.get("SEMISEG_DATA", "")


@pytest.fixture
def real_data() -> Path:
    """The folder that holds LA and ACDC."""
    if not REAL_DATA:
        pytest.skip("SEMISEG_DATA is not set: it names the folder that holds LA and ACDC")
    return Path(REAL_DATA)


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
