"""Compiles CUDA sources with a C++ compiler to run on the CPU (see emulator/), and loads them.

With SEMISEG_EMULATED_SANITIZE=1 in the environment they are compiled with the address sanitizer and the undefined
behaviour sanitizer, whose library has to be loaded before Python, and the C++ library with it:

    SEMISEG_EMULATED_SANITIZE=1 ASAN_OPTIONS=detect_leaks=0 \
        LD_PRELOAD="$(g++ -print-file-name=libasan.so) $(g++ -print-file-name=libstdc++.so)" \
        python -m pytest tests/kernels -k cuda
"""

import fcntl
import importlib.util
import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
from functools import cache
from pathlib import Path
from types import ModuleType

import semiseg_kernels
from semiseg_kernels import backends
from semiseg_kernels.native.extension import MODULES, extension

ROOT = Path(__file__).resolve().parents[2]
EMULATOR = Path(__file__).resolve().parent / "emulator"
SANITIZE = os.environ.get("SEMISEG_EMULATED_SANITIZE") == "1"
TOOL_ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
BUILD = ROOT / "build" / ("emulated-sanitized" if SANITIZE else "emulated")

# CUDA's compiler makes no use of the rule that pointers to different types differ.
FLAGS = "-std=c++17 -fPIC -fno-strict-aliasing -DSEMISEG_EMULATED -Wall -Wno-unknown-pragmas" + (
    " -O1 -g -fsanitize=address,undefined" if SANITIZE else " -O2"
)
KERNEL_FLAGS = "-fsanitize=alignment,bounds"  # the emulator itself handles what they find
LINK_FLAGS = "-fsanitize=address,undefined" if SANITIZE else ""


def missing_tools() -> str | None:
    """None if CUDA sources can be compiled for the CPU here, else what that lacks."""
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        return "the emulator is written for Linux on x86-64"
    if shutil.which(shlex.split(_compiler())[0]) is None:
        return "no C++ compiler (install g++, or set CXX)"
    if _ninja() is None:
        return "ninja is missing (pip install ninja)"
    if importlib.util.find_spec("pybind11") is None:
        return "pybind11 is missing (pip install pybind11)"
    if SANITIZE and "libasan" not in os.environ.get("LD_PRELOAD", ""):
        return f"SEMISEG_EMULATED_SANITIZE=1 also needs LD_PRELOAD (see {__name__}.py)"
    return None


@cache
def emulated_cuda_module() -> ModuleType:
    """Build csrc's CUDA for the CPU and make it the compiled module of the backend "cuda".

    Raises RuntimeError if a tool is missing (see `missing_tools`) or the sources do not compile.
    """
    kernels = BUILD / "libsemiseg_cuda.so"
    module = BUILD / f"_CUDA{sysconfig.get_config_var('EXT_SUFFIX')}"
    csrc = ROOT / "csrc"
    includes = [sysconfig.get_paths()["include"], _pybind11_include()]
    build_library(kernels, sorted(csrc.glob("*_cuda.cu")))
    # The emulator wants a library with nothing but kernels.
    build_library(module, [csrc / "bindings_cuda.cpp"], includes=includes, kernels=kernels)

    name = MODULES["cuda"]
    # Under its own name pybind11 would hand out the module made for a GPU once more.
    spec = importlib.util.spec_from_file_location("emulated._CUDA", module)
    assert spec is not None and spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    assert loaded.device_type == "cpu", "not the emulated module"
    sys.modules[name] = loaded
    setattr(semiseg_kernels, name.rpartition(".")[2], loaded)
    extension.cache_clear()
    backends._missing_reasons.pop("cuda", None)
    return loaded


def build_library(
    library: Path,
    sources: list[Path],
    includes: list[str] | None = None,
    kernels: Path | None = None,
) -> None:
    """Compile CUDA kernels with the emulator, or sources that call the library `kernels`; only what changed."""
    reason = missing_tools()
    if reason is not None:
        raise RuntimeError(reason)
    objects_directory = library.parent / library.name.partition(".")[0]
    objects_directory.mkdir(parents=True, exist_ok=True)
    directories = [str(EMULATOR), str(ROOT / "csrc"), *(includes or [])]
    flags = f"{FLAGS} {_cpu_flags()} {' '.join('-I' + shlex.quote(directory) for directory in directories)}"
    link_flags = LINK_FLAGS
    if kernels is None:
        flags += f" {KERNEL_FLAGS}"
        sources = [*sources, EMULATOR / "emulator.cpp"]
    else:
        link_flags += f" {shlex.quote(str(kernels))} -Wl,-rpath,'$ORIGIN'"
    lines = [
        "rule compile",
        f"  command = {_compiler()} -x c++ {_escape(flags)} -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = {_compiler()} -shared $in {_escape(link_flags)} -ldl -o $out",
    ]
    objects = []
    for source in sources:
        objects.append(_escape_path(objects_directory / f"{source.stem}.o"))
        lines.append(f"build {objects[-1]}: compile {_escape_path(source)}")
    lines.append(f"build {_escape_path(library)}: link {' '.join(objects)}")
    ninja_file = objects_directory / "build.ninja"
    with open(objects_directory / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # several test runs may share the source tree
        ninja_file.write_text("\n".join(lines) + "\n")
        command = [str(_ninja()), "-C", str(objects_directory), "-j", "2"]
        result = subprocess.run(command, check=False, capture_output=True, text=True, env=TOOL_ENVIRONMENT)
    if result.returncode != 0:
        raise RuntimeError(f"the emulated CUDA sources do not compile:\n{result.stdout}{result.stderr}")


def compiles(source: str) -> bool:
    """Whether the emulator accepts CUDA source text."""
    command = [*shlex.split(_compiler()), *shlex.split(FLAGS), f"-I{EMULATOR}", f"-I{ROOT / 'csrc'}"]
    command += ["-fsyntax-only", "-x", "c++", "-"]
    result = subprocess.run(
        command, check=False, input=source, capture_output=True, text=True, env=TOOL_ENVIRONMENT
    )
    return result.returncode == 0


def _compiler() -> str:
    return os.environ.get("CXX") or next(filter(shutil.which, ("g++", "c++", "clang++")), "g++")


def _ninja() -> str | None:
    if importlib.util.find_spec("ninja") is None:
        return shutil.which("ninja")
    import ninja

    return str(Path(ninja.BIN_DIR) / "ninja")


def _pybind11_include() -> str:
    import pybind11

    return pybind11.get_include()


def _cpu_flags() -> str:
    """Fused multiplication and addition as on a GPU, where the processor has it."""
    flags = set(Path("/proc/cpuinfo").read_text().split())
    return "-mavx2 -mfma -mf16c" if {"avx2", "fma", "f16c"} <= flags else ""


def _escape(text: str) -> str:
    return text.replace("$", "$$")


def _escape_path(path: Path) -> str:
    return _escape(str(path)).replace(" ", "$ ").replace(":", "$:")
