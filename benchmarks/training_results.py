"""Gather finished runs into one results file: python benchmarks/training_results.py FILE RUN [RUN ...].

Each row is one run: what was trained, with how many labels, by which command, on which machine and commit, and its test
figures. The tables of the documents are made from these files by benchmarks/tables.py.
"""

from __future__ import annotations

import argparse
import json
import shlex
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from semiseg.atomic import write_json
from semiseg.engine.metrics_log import INTERVAL
from semiseg.engine.run_directory import RunDirectory


def training_minutes(run: RunDirectory) -> float:
    """Minutes of all iterations at the median pace of their stage, so that a pause does not count.

    Raises ValueError where a stage is too short to have a pace.
    """
    stages = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    events = EventAccumulator(str(run.tensorboard), size_guidance={"scalars": 0}).Reload()
    times = {event.step: event.wall_time for event in events.Scalars("total")}
    seconds = 0.0
    for stage in dict.fromkeys(line["stage"] for line in stages):
        steps = sorted({line["iteration"] for line in stages if line["stage"] == stage and "total" in line})
        # The log is written some iterations at a time, so only every INTERVAL-th time means something.
        marks = steps[::INTERVAL]
        if len(marks) < 2:
            raise ValueError(
                f"{run.path} has {len(steps)} iterations of {stage}, accepted are more than {INTERVAL}, to tell a pace"
            )
        paces = [(times[last] - times[first]) / (last - first) for first, last in pairwise(marks)]
        seconds += len(steps) * median(paces)
    return round(seconds / 60, 1)


def without_folders(environment: dict[str, Any]) -> dict[str, Any]:
    """The environment with a command that does not say where on this machine the data and the run were."""
    words = shlex.split(environment["command"])
    kept = (word for word in words if not word.startswith(("output=", "dataset.root=")))
    return {**environment, "command": shlex.join(kept)}


def row(path: Path) -> dict[str, Any]:
    """The figures of one run."""
    run, _ = RunDirectory.open(path)
    results = json.loads(run.results.read_text())
    keys = (
        "name",
        "method",
        "preset",
        "labelled",
        "seed",
        "checkpoint",
        "iteration",
        "evaluation",
        "summary",
    )
    return {
        **{key: results[key] for key in keys},
        **({"text": results["text"]} if "text" in results else {}),
        "environment": without_folders(run.read_environment()),
        "training_minutes": training_minutes(run),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("runs", type=Path, nargs="+")
    options = parser.parse_args()
    write_json(options.file, {"rows": [row(path) for path in options.runs]})
