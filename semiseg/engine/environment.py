"""Where and with what something was measured or trained."""

import importlib
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("torch", "numpy", "semiseg")


def environment() -> dict[str, Any]:
    """Processor, cores, GPU if there is one, versions and commit.

    "-dirty" marks a commit with changes in its tracked files; where git does not know it, SEMISEG_COMMIT tells it.
    """
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "versions": {
            "python": platform.python_version(),
            **{package: importlib.metadata.version(package) for package in PACKAGES},
        },
        "commit": _commit() or os.environ.get("SEMISEG_COMMIT", "unknown"),
        **({"gpu": _gpu()} if torch.cuda.is_available() else {}),
    }


def _commit() -> str:
    if Path(_output("git", "rev-parse", "--show-toplevel") or ".").resolve() != ROOT:
        return ""  # the package is installed within another project
    return _output("git", "describe", "--always", "--dirty", "--exclude", "*")


def _gpu() -> dict[str, Any]:
    driver = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").partition("\n")[0]
    return {
        "name": torch.cuda.get_device_name(),
        "count": torch.cuda.device_count(),
        "versions": {
            "driver": driver or "unknown",
            "cuda": torch.version.cuda,
            "triton": _triton_version(),
        },
    }


def _cpu_model() -> str:
    about = Path("/proc/cpuinfo")  # of Linux
    for line in about.read_text().splitlines() if about.is_file() else ():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _triton_version() -> str:
    try:
        return importlib.import_module("triton").__version__  # its package has several names
    except ImportError:
        return "missing"


def _output(*command: str) -> str:
    """What a command prints, or nothing where it is missing or fails."""
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return done.stdout.strip()
