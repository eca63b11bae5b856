"""What the ladders share: rungs in processes of their own, each with a lever more than the one before, and their rows."""

import argparse
import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from memory import keep_heap
from results_file import write_results

from semiseg.config import Config, load_config
from semiseg.engine.allocator import HUGE_PAGES, TIGHT
from semiseg.engine.precision import has_bfloat16
from semiseg_kernels import backends
from semiseg_kernels.native.extension import extension

# workload, levers -> what was measured, with "seconds"
Measure = Callable[[str, Sequence[str]], dict[str, Any]]

# The levers that are kernels, and their operations.
KERNELS = {
    "fused losses": ("dice_ce", "prototype_head", "cluster_mean", "masked_class_mean", "prompt_mix"),
    "components in C++": ("largest_components",),
    "fused batch normalisation": ("batch_norm_relu",),
    "fused classifier": ("linear_classifier",),
    "own convolutions": ("convolution", "strided_convolution"),
}

# What keeps PyTorch and its libraries to an x86-64 level, as on a processor that has no more.
LEVELS = {
    "v3": {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"},
}


def climb(description: str, workloads: Sequence[str], levers: Sequence[str], measure: Measure) -> None:
    """The command line of a ladder: every workload from no lever to all that this processor has, and the results file.

    A rung is `measure(workload, its levers)`, to which the peak memory of its process is added. In several rounds all
    rungs take turns, and each is shown with what it measured in its median round. With `--level` everything computes as
    on a processor of this x86-64 level.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("workloads", nargs="*", default=tuple(workloads), help=", ".join(workloads))
    parser.add_argument("--results", type=Path, metavar="FILE", help="write the rows as JSON")
    parser.add_argument("--rounds", type=int, default=1, help="so many measurements of every rung")
    parser.add_argument("--level", choices=LEVELS, help="measure as on a processor that has no more than this")
    parser.add_argument(
        "--rung", type=int, metavar="LEVERS", help="measure one rung here and print it as JSON"
    )
    options = parser.parse_args()
    if options.level or not has_bfloat16(torch.device("cpu")):
        levers = [lever for lever in levers if lever != "bfloat16"]
    for workload in options.workloads:
        if workload not in workloads:
            parser.error(f"the workload is {workload!r}, accepted are {', '.join(workloads)}")
    if options.rung is not None:
        if options.level:
            extension("cpu").use_level(options.level)
        row = measure(options.workloads[0], levers[: options.rung])
        row["peak_gb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
        print(json.dumps(row))
        return
    rows = []
    for workload in options.workloads:
        rounds = [
            [_in_own_process(workload, levers[:count], options.level) for count in range(len(levers) + 1)]
            for _ in range(options.rounds)
        ]
        rungs = [_median(measured) for measured in zip(*rounds, strict=True)]
        rows.append({"workload": workload, "rungs": rungs})
    if options.results:
        write_results(options.results, rows)


def _median(measured: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Of the rounds of a rung the one with the median of seconds, and the seconds of all."""
    ranked = sorted(measured, key=lambda row: row["seconds"])
    middle = ranked[(len(ranked) - 1) // 2]
    return {**middle, "seconds_of_rounds": [row["seconds"] for row in measured]}


def prepare(name: str, overrides: Sequence[str], levers: Sequence[str]) -> Config:
    """The configuration with what the levers of all ladders say; sets the allocator of this process."""
    if "kept heap" in levers:
        keep_heap()
    channels_last = str("channels last" in levers).lower()
    precision = "auto" if "bfloat16" in levers else "float32"
    return load_config(
        name, [*overrides, f"training.channels_last={channels_last}", f"training.precision={precision}"]
    )


@contextmanager
def kernels_of(levers: Sequence[str]) -> Iterator[None]:
    """The operations of these levers on their kernels, all others on their reference."""
    fused = {operation for lever in levers for operation in KERNELS.get(lever, ())}
    select = backends.select

    def choose(operation: str, *arguments: Any) -> str:
        return select(operation, *arguments) if operation in fused else "reference"

    with (
        mock.patch.object(backends, "select", choose),
        mock.patch.object(backends, "reference_is_requested", lambda: "fused losses" not in levers),
    ):
        yield


def _in_own_process(workload: str, levers: Sequence[str], level: str | None) -> dict[str, Any]:
    command = [sys.executable, sys.argv[0], workload, "--rung", str(len(levers))]
    environment = dict(os.environ)
    tunables = {"tight heap": TIGHT, "huge pages": HUGE_PAGES}
    environment["GLIBC_TUNABLES"] = ":".join(tunables[lever] for lever in levers if lever in tunables)
    if level:
        command += ["--level", level]
        environment |= LEVELS[level]
    output = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout
    row = {"levers": list(levers), **json.loads(output)}
    print(f"{workload}, {len(levers)} levers: {row['seconds']:.2f} s, {row['peak_gb']:.2f} GB", flush=True)
    return row
