"""Gather finished runs into one results file: python benchmarks/training_results.py FILE RUN [RUN ...].

Each row is one run: what was trained, with how many labels, by which command, on which machine and commit, and its test
figures. The README's tables are made from these files by benchmarks/tables.py.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from semiseg.engine.atomic import write_json
from semiseg.engine.run_directory import RunDirectory


def training_minutes(run: RunDirectory) -> float:
    """Minutes from the first logged iteration to the last, by the clock of the TensorBoard events."""
    events = EventAccumulator(str(run.tensorboard), size_guidance={"scalars": 0}).Reload()
    times = [event.wall_time for event in events.Scalars("total")]
    return round((times[-1] - times[0]) / 60, 1)


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
        "environment": json.loads(run.environment.read_text()),
        "training_minutes": training_minutes(run),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("runs", type=Path, nargs="+")
    options = parser.parse_args()
    write_json(options.file, {"rows": [row(path) for path in options.runs]})
