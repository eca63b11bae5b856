"""Packaging metadata and the build of the C++ kernels with ninja.

Every kernel source `csrc/<operation>_cpu.cpp` is compiled once per x86-64 level and the level is chosen when the
extension is imported. The build directory is `build/` in the source tree, so a later build compiles only what changed.
Without a working C++ compiler the package still installs and computes with its PyTorch reference.
"""

import filecmp
import os
import platform
import shlex
import shutil
import subprocess
import sysconfig
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
BUILD = ROOT / "build"
X86_LEVELS = {"baseline": "", "v3": "-march=x86-64-v3", "v4": "-march=x86-64-v4 -mprefer-vector-width=512"}
# No -ffast-math: NaN has to propagate. GCC's own AVX-512 header warns of uninitialised values.
CXXFLAGS = (
    "-std=c++17 -O3 -fPIC -fopenmp -fvisibility=hidden -fno-math-errno -fno-trapping-math"
    " -Wall -Wno-psabi -Wno-uninitialized -Wno-maybe-uninitialized"
)


def find_ninja() -> str:
    try:
        import ninja

        return str(Path(ninja.BIN_DIR) / "ninja")
    except ImportError:
        found = shutil.which("ninja")
    if found is None:
        raise RuntimeError("ninja is missing (pip install ninja)")
    return found


def find_compiler() -> str:
    command = os.environ.get("CXX") or next(filter(shutil.which, ("c++", "g++", "clang++")), "c++")
    if shutil.which(shlex.split(command)[0]) is None:
        raise RuntimeError(f"no C++ compiler: {command!r} is not an executable (install g++, or set CXX)")
    return command


def accepts(compiler: str, flags: str) -> bool:
    command = [*shlex.split(compiler), *flags.split(), "-x", "c++", "-E", os.devnull]
    return subprocess.run(command, check=False, capture_output=True).returncode == 0


def instruction_levels(compiler: str) -> dict[str, str]:
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return {"baseline": ""}
    return {level: flags for level, flags in X86_LEVELS.items() if accepts(compiler, flags)}


def copy_pybind11_headers() -> Path:
    """Copy what differs: an isolated build finds pybind11 under a new path each time, which would recompile all."""
    try:
        import pybind11
    except ImportError:
        raise RuntimeError("pybind11 is missing (pip install pybind11)") from None
    source, target = Path(pybind11.get_include()), BUILD / "include"
    for header in source.glob("pybind11/**/*.h"):
        copy = target / header.relative_to(source)
        if not copy.exists() or not filecmp.cmp(header, copy, shallow=False):
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(header, copy)
    return target


def write_ninja_file(compiler: str, pybind11_include: Path, library: Path) -> None:
    def escape(path: Path) -> str:
        return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")

    def quote(path: Path | str) -> str:
        return shlex.quote(str(path)).replace("$", "$$")

    levels = instruction_levels(compiler)
    includes = f"-I{quote(pybind11_include)} -I{quote(sysconfig.get_paths()['include'])}"
    defines = " ".join(f"-DSEMISEG_HAS_{level.upper()}" for level in levels)
    lines = [
        f"cxx = {compiler}",
        "rule compile",
        f"  command = $cxx {CXXFLAGS} $flags -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        "  command = $cxx -shared -fopenmp $in -o $out",
    ]
    objects = []

    def compile_object(source: Path, name: str, flags: str) -> None:
        objects.append(escape(BUILD / name))
        lines.append(f"build {objects[-1]}: compile {escape(source)}")
        lines.append(f"  flags = {flags}")

    for source in sorted((ROOT / "csrc").glob("*_cpu.cpp")):
        for level, flags in levels.items():
            compile_object(source, f"{level}/{source.stem}.o", f"{flags} -DSEMISEG_LEVEL={level}")
    compile_object(ROOT / "csrc" / "bindings.cpp", "bindings.o", f"{includes} {defines}")
    lines.append(f"build {escape(library)}: link {' '.join(objects)}")
    (BUILD / "build.ninja").write_text("\n".join(lines) + "\n")


def build_library(library: Path) -> None:
    ninja = find_ninja()
    compiler = find_compiler()
    BUILD.mkdir(exist_ok=True)
    write_ninja_file(compiler, copy_pybind11_headers(), library)
    subprocess.run([ninja, "-C", str(BUILD), "-f", "build.ninja"], check=True)


class NinjaBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name))
        library = BUILD / target.name
        try:
            build_library(library)
        except (RuntimeError, OSError, subprocess.CalledProcessError) as error:
            print(f"semiseg: the C++ kernels are not built: {error}")
            print("semiseg: installing without them; every operation runs on its PyTorch reference")
            # A library left from an earlier build would not match the Python code.
            for stale in (target, ROOT / "semiseg_kernels" / target.name):
                stale.unlink(missing_ok=True)
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        self.copy_file(str(library), str(target))


setup(
    name="semiseg",
    version="0.1.0",
    description="Kernels and training for semi-supervised medical image segmentation",
    python_requires=">=3.11",
    packages=find_packages(include=["semiseg", "semiseg.*", "semiseg_kernels", "semiseg_kernels.*"]),
    package_data={"semiseg": ["configs/*.yaml", "configs/**/*.yaml"]},
    ext_modules=[Extension("semiseg_kernels._C", sources=[], optional=True)],
    cmdclass={"build_ext": NinjaBuild},
    install_requires=[
        "torch>=2.11,<2.14",
        "numpy",
        "scipy",
        "scikit-learn",
        "pyyaml",
        "h5py",
        "tqdm",
        "tensorboard",
        "safetensors",
        "matplotlib",
    ],
    extras_require={"test": ["pytest", "pytest-benchmark", "medpy", "ruff", "mypy"]},
)
