"""Packaging metadata and the build of the C++ and CUDA kernels with ninja.

Every kernel source `csrc/<operation>_cpu.cpp` is compiled once per x86-64 level and the level is chosen when the
extension is imported. The build directory is `build/` in the source tree, so a later build compiles only what changed.
Without a working C++ compiler the package still installs and computes with its PyTorch reference.

Where nvcc works (looked for in CUDA_HOME, CUDA_PATH, PATH and /usr/local/cuda*), `csrc/<operation>_cuda.cu` are compiled
for compute capabilities 8.0, 9.0, 10.0 and 12.0, with PTX for others. SEMISEG_CUDA_ARCHITECTURES="90" or "80;90"
compiles for fewer, which is quicker; "" or "none" leaves the CUDA kernels out. The CUDA runtime is linked statically.
"""

import filecmp
import os
import platform
import re
import shlex
import shutil
import subprocess
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
BUILD = ROOT / "build"
CLIP = ["transformers"]
EXPORT = ["onnx", "onnxscript", "onnxruntime"]
X86_LEVELS = {"baseline": "", "v3": "-march=x86-64-v3", "v4": "-march=x86-64-v4 -mprefer-vector-width=512"}
# No -ffast-math: NaN has to propagate. GCC's own AVX-512 header warns of uninitialised values.
CXXFLAGS = (
    "-std=c++17 -O3 -fPIC -fopenmp -fvisibility=hidden -fno-math-errno -fno-trapping-math"
    " -Wall -Wno-psabi -Wno-uninitialized -Wno-maybe-uninitialized"
)
CUDA_ARCHITECTURES = (80, 90, 100, 120)
# Machine code of the newer two is made of the intermediate code of this one, which the compiler makes once for all three.
INTERMEDIATE = {100: 80, 120: 80}
NVCCFLAGS = "-std=c++17 -O3 --expt-relaxed-constexpr -Xcompiler=-fPIC,-fvisibility=hidden,-Wall"


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


def escape(path: Path) -> str:
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def quote(path: Path | str) -> str:
    return shlex.quote(str(path)).replace("$", "$$")


def python_includes() -> str:
    return f"-I{quote(copy_pybind11_headers())} -I{quote(sysconfig.get_paths()['include'])}"


def run_ninja(
    directory: Path,
    compile_command: str,
    link_command: str,
    sources: list[tuple[Path, str, str]],  # source, name of its object, further flags
    library: Path,
) -> None:
    """Compile the sources whose objects are out of date, and link them to the library."""
    lines = [
        "rule compile",
        f"  command = {compile_command} $flags -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = {link_command} $in -o $out",
    ]
    objects = []
    for source, name, flags in sources:
        objects.append(escape(directory / name))
        lines += [f"build {objects[-1]}: compile {escape(source)}", f"  flags = {flags}"]
    lines.append(f"build {escape(library)}: link {' '.join(objects)}")
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "build.ninja").write_text("\n".join(lines) + "\n")
    subprocess.run([find_ninja(), "-C", str(directory), "-f", "build.ninja"], check=True)


def build_cpu_library(library: Path) -> None:
    compiler = find_compiler()
    levels = instruction_levels(compiler)
    sources = [
        (source, f"{level}/{source.stem}.o", f"{flags} -DSEMISEG_LEVEL={level}")
        for source in sorted((ROOT / "csrc").glob("*_cpu.cpp"))
        for level, flags in levels.items()
    ]
    defines = " ".join(f"-DSEMISEG_HAS_{level.upper()}" for level in levels)
    sources.append((ROOT / "csrc" / "bindings.cpp", "bindings.o", f"{python_includes()} {defines}"))
    compile_command = f"{compiler} {CXXFLAGS} {os.environ.get('CXXFLAGS', '')}"
    run_ninja(BUILD, compile_command, f"{compiler} -shared -fopenmp", sources, library)


def nvcc_candidates() -> Iterator[Path]:
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if os.environ.get(variable):
            yield Path(os.environ[variable]) / "bin" / "nvcc"
    on_path = shutil.which("nvcc")
    if on_path is not None:
        yield Path(on_path)
    yield from sorted(Path("/usr/local").glob("cuda*/bin/nvcc"), reverse=True)


def find_nvcc() -> tuple[Path, set[int]]:
    """The first nvcc that works, and the architectures it compiles for."""
    broken = []
    for nvcc in nvcc_candidates():
        try:
            listed = subprocess.run(
                [nvcc, "--list-gpu-arch"], check=True, capture_output=True, text=True
            ).stdout
        except (OSError, subprocess.CalledProcessError) as error:
            broken.append(f"{nvcc} does not work ({error})")
            continue
        return nvcc, {int(number) for number in re.findall(r"compute_(\d+)", listed)}
    raise RuntimeError("; ".join(broken) or "nvcc is missing (install the CUDA toolkit, or set CUDA_HOME)")


def cuda_architectures(known: set[int]) -> list[int]:
    requested = os.environ.get("SEMISEG_CUDA_ARCHITECTURES")
    if requested is None:
        chosen = [architecture for architecture in CUDA_ARCHITECTURES if architecture in known]
    elif re.fullmatch(r"\d+(;\d+)*", requested):
        chosen = sorted({int(number) for number in requested.split(";")})
    else:
        raise RuntimeError(f"SEMISEG_CUDA_ARCHITECTURES is {requested!r}, accepted are numbers as in '80;90', and 'none'")
    if not chosen or not known.issuperset(chosen):
        raise RuntimeError(f"nvcc compiles for {sorted(known)}, not for {chosen or list(CUDA_ARCHITECTURES)}")
    return chosen


def code_generation_flags(architectures: list[int]) -> str:
    targets = [(INTERMEDIATE.get(number, number), f"sm_{number}") for number in architectures]
    oldest = min(intermediate for intermediate, _ in targets)
    targets.append((oldest, f"compute_{oldest}"))  # for what none of them fits
    return " ".join(f"-gencode=arch=compute_{intermediate},code={code}" for intermediate, code in targets)


def build_cuda_library(library: Path) -> None:
    if os.environ.get("SEMISEG_CUDA_ARCHITECTURES") in ("", "none"):
        raise RuntimeError("SEMISEG_CUDA_ARCHITECTURES says so")
    nvcc, known = find_nvcc()
    flags = code_generation_flags(cuda_architectures(known))
    sources = [(source, f"{source.stem}.o", flags) for source in sorted((ROOT / "csrc").glob("*_cuda.cu"))]
    sources.append((ROOT / "csrc" / "bindings_cuda.cpp", "bindings_cuda.o", python_includes()))
    # PyTorch has a CUDA runtime of its own: the symbols of this one stay inside.
    link = f"{quote(nvcc)} -shared -cudart=static -Xlinker=--exclude-libs,ALL"
    run_ninja(BUILD / "cuda", f"{quote(nvcc)} {NVCCFLAGS}", link, sources, library)


# How each extension is built, what it holds, and what runs in its place.
EXTENSIONS = {
    "_C": (build_cpu_library, "C++", "every operation on the CPU runs on its PyTorch reference"),
    "_CUDA": (build_cuda_library, "CUDA", "operations on a GPU run on Triton or their PyTorch reference"),
}


class NinjaBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        build_library, language, instead = EXTENSIONS[ext.name.rpartition(".")[2]]
        target = Path(self.get_ext_fullpath(ext.name))
        library = BUILD / target.name
        try:
            build_library(library)
        except (RuntimeError, OSError, ValueError, subprocess.CalledProcessError) as error:
            print(f"semiseg: the {language} kernels are not built, {instead}: {error}")
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
    package_data={
        "semiseg": ["py.typed", "configs/*.yaml", "configs/**/*.yaml", "reporting/templates/*.html"],
        "semiseg_kernels": ["py.typed"],
    },
    ext_modules=[Extension(f"semiseg_kernels.{name}", sources=[], optional=True) for name in EXTENSIONS],
    cmdclass={"build_ext": NinjaBuild},
    install_requires=[
        "torch>=2.11,<2.14",
        "triton>=3.6; platform_system == 'Linux'",
        "numpy",
        "scipy",
        "scikit-learn>=1.5",
        "scikit-image",
        "jinja2",
        "pyyaml",
        "h5py",
        "nibabel",
        "pynrrd",
        "pydicom",
        "pillow>=11.3",
        "tqdm",
        "tensorboard",
        "safetensors",
        "matplotlib",
    ],
    extras_require={
        "clip": CLIP,
        "export": EXPORT,
        "test": [*CLIP, *EXPORT, "pybind11", "ninja", "setuptools", "pytest", "pytest-xdist", "pytest-benchmark", "hypothesis", "medpy", "ruff", "mypy"],
    },
)
