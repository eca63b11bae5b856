"""Where a run was trained: on any system, and never by another project's commit."""

import os
import platform
import subprocess
from pathlib import Path

import pytest

from semiseg.engine import environment as module
from semiseg.engine.environment import environment


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A project with one commit."""
    identity = ["-c", "user.name=nobody", "-c", "user.email=nobody@nowhere"]
    for arguments in (["init", "-q"], [*identity, "commit", "-q", "--allow-empty", "-m", "first"]):
        subprocess.run(["git", *arguments], cwd=tmp_path, check=True)
    return tmp_path


def test_the_commit_is_that_of_the_package(repository, monkeypatch):
    monkeypatch.setattr(module, "ROOT", repository.resolve())
    monkeypatch.delenv("SEMISEG_COMMIT", raising=False)
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=repository, capture_output=True, text=True, check=True
    )
    assert environment()["commit"] == commit.stdout.strip()
    (repository / "new").touch()
    subprocess.run(["git", "add", "new"], cwd=repository, check=True)
    assert environment()["commit"] == f"{commit.stdout.strip()}-dirty"


def test_a_project_that_the_package_is_installed_in_is_not_asked(repository, monkeypatch):
    installed = repository / ".venv" / "site-packages"
    installed.mkdir(parents=True)
    monkeypatch.setattr(module, "ROOT", installed.resolve())
    monkeypatch.delenv("SEMISEG_COMMIT", raising=False)
    assert environment()["commit"] == "unknown"
    monkeypatch.setenv("SEMISEG_COMMIT", "c0ffee")
    assert environment()["commit"] == "c0ffee"


def test_systems_other_than_linux(monkeypatch):
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(Path, "is_file", lambda path: False)
    found = environment()
    assert found["cores"] == os.cpu_count()
    assert found["cpu"] == (platform.processor() or platform.machine())
