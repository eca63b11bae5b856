"""The folder a run leaves behind: configuration, metrics, checkpoints, results and pictures."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path

import yaml

from semiseg.config import Config, config_from_mapping, config_to_mapping
from semiseg.engine.atomic import write_json, write_text
from semiseg.engine.environment import environment

LOG_INTERVAL = 10  # iterations


class RunDirectory:
    """Names of everything in a run's folder."""

    def __init__(self, path: Path):
        self.path = path
        self.config = path / "config.yaml"
        self.environment = path / "environment.json"
        self.dataset = path / "dataset.json"  # what prediction must know of the dataset
        self.text = path / "text.safetensors"  # of a method that learns from text
        self.metrics = path / "metrics.jsonl"
        self.tensorboard = path / "tensorboard"
        self.results = path / "results.json"
        self.learning_curves = path / "learning_curves.png"
        self.overlays = path / "overlays"

    def checkpoint(self, name: str = "last") -> Path:
        """A checkpoint's file: `last`, or the best on `validation` or `test`."""
        return self.path / f"{name}.safetensors"

    @classmethod
    def create(cls, config: Config) -> RunDirectory:
        """Make the folder and write the configuration as resolved, and the command, machine, versions and commit.

        Raises ValueError where `output` names a folder that holds something already.
        """
        if config.output is None:
            path = _first_free(Path("runs") / config.name)
        else:
            path = Path(config.output)
            if path.exists() and (not path.is_dir() or any(path.iterdir())):
                raise ValueError(
                    f"output is {path}, which exists already; accepted is a new or an empty folder"
                )
        path.mkdir(parents=True, exist_ok=True)
        run = cls(path)
        write_text(run.config, yaml.safe_dump(config_to_mapping(config), sort_keys=False))
        write_json(run.environment, {"command": shlex.join(sys.orig_argv), **environment()})
        return run

    @classmethod
    def open(cls, path: Path) -> tuple[RunDirectory, Config]:
        """An existing run and its configuration. Raises FileNotFoundError where there is none."""
        run = cls(path)
        if not run.config.is_file():
            raise FileNotFoundError(f"{path} is no run directory: {run.config.name} is missing")
        return run, config_from_mapping(yaml.safe_load(run.config.read_text()))


def _first_free(path: Path) -> Path:
    candidate, number = path, 1
    while candidate.exists():
        number += 1
        candidate = path.with_name(f"{path.name}-{number}")
    return candidate


class MetricsLog:
    """Scalars of every iteration, to JSON lines and TensorBoard.

    Values are kept as tensors and read `interval` iterations at a time, so that a GPU is not made to wait every step.
    """

    def __init__(self, run: RunDirectory, interval: int = LOG_INTERVAL):
        from torch.utils.tensorboard import SummaryWriter

        self._file = run.metrics.open("a", buffering=1)
        self._tensorboard = SummaryWriter(str(run.tensorboard))
        self._interval = interval
        self._pending: list[tuple[int, str, dict]] = []
        self.latest: dict[str, float] = {}

    def add(self, iteration: int, stage: str, values: dict) -> None:
        """Log scalars (tensors or floats) of an iteration, counted from 1 over all stages.

        Raises FloatingPointError naming the iteration where the total loss is NaN or infinite; it may come up to
        `interval` iterations late.
        """
        self._pending.append((iteration, stage, values))
        if len(self._pending) >= self._interval:
            self.flush()

    def flush(self) -> None:
        pending, self._pending = self._pending, []
        for iteration, stage, values in pending:
            numbers = {key: float(value) for key, value in values.items()}
            if not abs(numbers.get("total", 0.0)) < float("inf"):
                raise FloatingPointError(f"the loss is {numbers['total']} at iteration {iteration} ({stage})")
            self._file.write(json.dumps({"iteration": iteration, "stage": stage, **numbers}) + "\n")
            for key, number in numbers.items():
                self._tensorboard.add_scalar(key, number, iteration)
            self.latest = numbers

    def close(self) -> None:
        self._file.close()
        self._tensorboard.close()
