"""The build of the C++ kernels, run in a copy of the source tree."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def source_tree(tmp_path):
    for name in ("setup.py", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "semiseg_kernels").mkdir()
    (tmp_path / "semiseg_kernels" / "__init__.py").touch()
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    return tmp_path


def build(tree, **environment):
    return subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--inplace"],
        check=False,
        cwd=tree,
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )


def built_library(tree):
    return next((tree / "semiseg_kernels").glob("_C*.so"), None)


def test_no_torch_header():
    for source in (ROOT / "csrc").iterdir():
        includes = re.findall(r"^\s*#\s*include\s*[<\"]([^>\"]+)", source.read_text(), re.MULTILINE)
        assert not [header for header in includes if re.match(r"torch/|ATen/|c10/", header)], source


@pytest.mark.parametrize("compiler", ["/nonexistent", "false"])
def test_installs_without_a_working_compiler(source_tree, compiler):
    result = build(source_tree, CXX=compiler)
    assert result.returncode == 0, result.stderr
    assert "C++ kernels are not built" in result.stdout
    assert built_library(source_tree) is None


def test_recompiles_only_what_changed(source_tree):
    pytest.importorskip("pybind11")
    if shutil.which("c++") is None:
        pytest.skip("no C++ compiler")
    keep = {"momentum_update_cpu.cpp"}
    for source in (source_tree / "csrc").glob("*_cpu.cpp"):
        if source.name not in keep:
            source.unlink()
    # What is compiled matters here, not what it computes: an empty module is enough, and quick.
    (source_tree / "csrc" / "bindings.cpp").write_text('extern "C" void nothing() {}\n')

    assert build(source_tree).returncode == 0
    assert built_library(source_tree) is not None
    objects = {path: path.stat().st_mtime_ns for path in (source_tree / "build").glob("**/*.o")}
    assert len(objects) > 1

    source = source_tree / "csrc" / "bindings.cpp"
    source.write_text(source.read_text() + "// changed\n")
    assert build(source_tree).returncode == 0
    changed = {path.name for path, time in objects.items() if path.stat().st_mtime_ns != time}
    assert changed == {"bindings.o"}

    unchanged = {path: path.stat().st_mtime_ns for path in objects}
    assert build(source_tree).returncode == 0
    assert unchanged == {path: path.stat().st_mtime_ns for path in objects}

    header = source_tree / "csrc" / "momentum_update.h"
    header.write_text(header.read_text() + "// changed\n")
    assert build(source_tree).returncode == 0
    changed = {path.name for path, time in unchanged.items() if path.stat().st_mtime_ns != time}
    assert changed == {"momentum_update_cpu.o"}
