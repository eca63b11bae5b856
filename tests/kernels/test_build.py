"""The build of the C++ and CUDA kernels, run in a copy of the source tree."""

import os
import re
import runpy
import shutil
import subprocess
import sys
import sysconfig
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

import semiseg_kernels

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
    """Without the CUDA kernels, unless the environment asks for them."""
    return subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--inplace"],
        check=False,
        cwd=tree,
        env=os.environ | {"SEMISEG_CUDA_ARCHITECTURES": "none"} | environment,
        capture_output=True,
        text=True,
    )


def built_library(tree, name="_C"):
    return next((tree / "semiseg_kernels").glob(f"{name}.*.so"), None)


@pytest.fixture
def small_source_tree(source_tree):
    """One operation, and modules without bindings: what is compiled matters here, not what it computes."""
    for source in [*(source_tree / "csrc").glob("*_cpu.cpp"), *(source_tree / "csrc").glob("*_cuda.cu")]:
        if not source.name.startswith("momentum_update"):
            source.unlink()
    for bindings in ("bindings.cpp", "bindings_cuda.cpp"):
        (source_tree / "csrc" / bindings).write_text('extern "C" void nothing() {}\n')
    return source_tree


@pytest.fixture
def setup_functions(monkeypatch):
    """The global names of setup.py, which monkeypatch can replace."""
    monkeypatch.setattr("setuptools.setup", lambda **_: None)
    return runpy.run_path(str(ROOT / "setup.py"))["find_nvcc"].__globals__


def fake_nvcc(directory, script):
    nvcc = directory / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text(f"#!/bin/sh\n{script}\n")
    nvcc.chmod(0o755)
    return nvcc


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


def test_recompiles_only_what_changed(small_source_tree):
    pytest.importorskip("pybind11")
    if shutil.which("c++") is None:
        pytest.skip("no C++ compiler")
    source_tree = small_source_tree

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


def test_installs_with_a_broken_nvcc(small_source_tree, tmp_path):
    """It lists what it would compile for, and then fails. The C++ kernels are built all the same."""
    pytest.importorskip("pybind11")
    if shutil.which("c++") is None:
        pytest.skip("no C++ compiler")
    fake_nvcc(tmp_path / "cuda", 'test "$1" = --list-gpu-arch && echo compute_90 && exit\nexit 1')
    stale = small_source_tree / "semiseg_kernels" / built_name("_CUDA")
    stale.touch()
    result = build(small_source_tree, CUDA_HOME=str(tmp_path / "cuda"), SEMISEG_CUDA_ARCHITECTURES="90")
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("semiseg: the CUDA kernels are not built") == 1
    assert not stale.exists() and built_library(small_source_tree, "_CUDA") is None
    assert built_library(small_source_tree) is not None


def built_name(name):
    return f"{name}{sysconfig.get_config_var('EXT_SUFFIX')}"


def test_cuda_can_be_left_out(small_source_tree):
    result = build(small_source_tree, CXX="false", SEMISEG_CUDA_ARCHITECTURES="")
    assert result.returncode == 0, result.stderr
    assert "the CUDA kernels are not built" in result.stdout and "SEMISEG_CUDA_ARCHITECTURES" in result.stdout
    assert built_library(small_source_tree, "_CUDA") is None


def test_nvcc_is_looked_for(setup_functions, monkeypatch, tmp_path):
    for directory in ("home", "path", "searched"):
        fake_nvcc(tmp_path / directory, "echo compute_80")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("CUDA_PATH", str(tmp_path / "path"))
    monkeypatch.setenv("PATH", str(tmp_path / "searched" / "bin"))
    candidates = list(setup_functions["nvcc_candidates"]())
    assert candidates[:3] == [tmp_path / name / "bin" / "nvcc" for name in ("home", "path", "searched")]


def test_the_first_nvcc_that_works_is_taken(setup_functions, monkeypatch, tmp_path):
    broken = fake_nvcc(tmp_path / "broken", "exit 1")
    working = fake_nvcc(tmp_path / "working", "echo compute_80; echo compute_90")
    monkeypatch.setitem(
        setup_functions, "nvcc_candidates", lambda: iter([tmp_path / "absent", broken, working])
    )
    assert setup_functions["find_nvcc"]() == (working, {80, 90})
    monkeypatch.setitem(setup_functions, "nvcc_candidates", lambda: iter([broken]))
    with pytest.raises(RuntimeError, match="broken/bin/nvcc does not work"):
        setup_functions["find_nvcc"]()
    monkeypatch.setitem(setup_functions, "nvcc_candidates", lambda: iter([]))
    with pytest.raises(RuntimeError, match="nvcc is missing"):
        setup_functions["find_nvcc"]()


def test_architectures(setup_functions, monkeypatch):
    architectures = setup_functions["cuda_architectures"]
    monkeypatch.delenv("SEMISEG_CUDA_ARCHITECTURES", raising=False)
    assert architectures({75, 80, 86, 90, 100, 120, 121}) == [80, 90, 100, 120]
    assert architectures({75, 80, 86, 90}) == [80, 90]
    monkeypatch.setenv("SEMISEG_CUDA_ARCHITECTURES", "90;86")
    assert architectures({80, 86, 90}) == [86, 90]
    with pytest.raises(RuntimeError, match=r"nvcc compiles for \[80\], not for \[86, 90\]"):
        architectures({80})
    for wrong in ("8.0;9.0", "90;", "sm_90"):
        monkeypatch.setenv("SEMISEG_CUDA_ARCHITECTURES", wrong)
        with pytest.raises(RuntimeError, match=f"^SEMISEG_CUDA_ARCHITECTURES is '{wrong}', accepted are numbers"):
            architectures({80})
    flags = setup_functions["code_generation_flags"]
    assert flags([90]) == "-gencode=arch=compute_90,code=sm_90 -gencode=arch=compute_90,code=compute_90"
    assert flags([80, 90, 100, 120]).split() == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_90,code=sm_90",
        "-gencode=arch=compute_80,code=sm_100",
        "-gencode=arch=compute_80,code=sm_120",
        "-gencode=arch=compute_80,code=compute_80",
    ]


@pytest.fixture
def disassemble() -> Callable[..., str]:
    """What cuobjdump says with these options of the CUDA kernels as the installation compiled them."""
    # Not by its name, under which an emulated one may be loaded.
    library = Path(semiseg_kernels.__file__).parent / f"_CUDA{sysconfig.get_config_var('EXT_SUFFIX')}"
    if not library.exists():
        pytest.skip("the CUDA kernels are not built")
    triton = pytest.importorskip("triton")
    cuobjdump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return lambda *options: (
        subprocess.run([cuobjdump, *options, library], check=True, capture_output=True, text=True).stdout
    )


def test_no_cuda_kernel_spills(disassemble):
    """For every architecture."""
    kernels = Counter()
    for image in disassemble("--dump-resource-usage").split("arch = sm_")[1:]:
        architecture = image.split()[0]
        for name, stack, local in re.findall(
            r"Function (\S+):\s+REG:\d+ STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", image
        ):
            assert (stack, local) == ("0", "0"), f"{name} for {architecture}"
            kernels[architecture] += 1
    assert kernels and all(count >= 30 for count in kernels.values())


@pytest.mark.slow
def test_loads_do_not_wait_for_each_other(disassemble):
    """A map's bytes are not read in the branch that loads them, ahead of other loads, nor is a vector of batch
    normalisation read before the tile's last one is on its way."""
    kernels = disassemble("-sass", "-arch", "sm_90").split("Function : ")[1:]
    if not kernels:
        pytest.skip("the CUDA kernels are built for other architectures")
    of_bytes = of_vectors = 0
    for kernel in kernels:
        name = kernel.split()[0]
        if "LargestComponents" in name:
            continue  # each of its threads has a single voxel
        instructions = re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\d+ )?(.*?);", kernel, re.MULTILINE)
        targets = {
            int(target, 16)
            for _, text in instructions
            for target in re.findall(r"^(?:BRA|BSSY).*?0x([0-9a-f]+)", text)
        }
        vectors_left = sum(_is_vector_load(text) for _, text in instructions) if "DenseVectors" in name else 0
        of_vectors += vectors_left > 0
        assert vectors_left % 4 == 0, name
        loaded_bytes: set[int] = set()  # registers
        loaded_vectors: set[int] = set()
        for address, text in instructions:
            if int(address, 16) in targets or re.match("BRA|BRX|BSYNC|CALL|EXIT|RET", text):
                loaded_bytes.clear()
            registers = [int(number) for number in re.findall(r"\bR(\d+)\b", text)]
            read = registers[1:] if text.startswith("LDG") else registers
            assert not (loaded_bytes | loaded_vectors) & set(read), f"{name} at {address}: {text}"
            if text.startswith("LDG.E.U8"):
                loaded_bytes.add(registers[0])
                of_bytes += 1
            if vectors_left and _is_vector_load(text):
                vectors_left -= 1
                loaded_vectors.update(range(registers[0], registers[0] + 4))
                if vectors_left == 0:
                    loaded_vectors.clear()
    assert of_bytes >= 100 and of_vectors >= 20


def _is_vector_load(instruction: str) -> bool:
    return instruction.startswith("LDG") and ".128" in instruction
