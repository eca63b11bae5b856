"""Challenges as they are handed out."""

from pathlib import Path

import challenge_files as files
import pytest
from challenge_preparation import SOURCES


@pytest.fixture(params=SOURCES)
def challenge(request, tmp_path) -> tuple[str, Path]:
    return request.param, SOURCES[request.param](tmp_path / "source")


@pytest.fixture
def left_atrium(tmp_path) -> Path:
    return files.left_atrium_source(tmp_path / "source")


@pytest.fixture
def acdc(tmp_path) -> Path:
    return files.acdc_source(tmp_path / "source")


@pytest.fixture
def pancreas(tmp_path) -> Path:
    return files.pancreas_source(tmp_path / "source")
