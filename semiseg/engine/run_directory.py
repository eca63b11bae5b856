"""The folder a run leaves behind: configuration, metrics, checkpoints, results and pictures."""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
import yaml

from semiseg.atomic import remove_leftovers, write_json, write_new_text
from semiseg.config import Config, config_from_mapping, config_to_mapping
from semiseg.config_files import read_mapping
from semiseg.data import Dataset
from semiseg.data.description import DatasetDescription
from semiseg.data.files import read_list
from semiseg.destinations import check_destination
from semiseg.engine.environment import environment
from semiseg.engine.precision import precision
from semiseg.text import TextEmbeddings

try:
    import fcntl
except ImportError:  # a system without it, such as Windows
    fcntl = None  # type: ignore[assignment]


# Keys that may have another value than the run's where it is resumed or evaluated: the machine may be another.
RESUMED_WITH = ("dataset.root", "training.device", "training.checkpoint_minutes")
EVALUATED_WITH = ("dataset.root", "training.device")


class RunDirectory:
    """Names of everything in a run's folder."""

    def __init__(self, path: Path):
        self.path = path
        self.config = path / "config.yaml"
        self.environment = path / "environment.json"
        self.dataset = path / "dataset.json"  # what prediction must know of the dataset
        self.training_cases = path / "training_cases.list"  # names, of labelled and unlabelled cases
        self.text = path / "text.safetensors"  # of a method that learns from text
        self.metrics = path / "metrics.jsonl"
        self.tensorboard = path / "tensorboard"
        self.events = self.tensorboard / "events.out.tfevents"  # TensorBoard knows its files by such a name
        self.training_state = path / "training_state.safetensors"  # of a run that is not finished
        self.results = path / "results.json"
        self.learning_curves = path / "learning_curves.png"
        self.overlays = path / "overlays"
        self.surfaces = path / "surfaces"
        self.embedding_map = path / "embedding_map.png"
        self.report = path / "report.html"

    def checkpoint(self, name: str = "last") -> Path:
        """A checkpoint's file: `last`, or the best on `validation` or `test`."""
        return self.path / f"{name}.safetensors"

    @property
    def resume_command(self) -> str:
        """The command that resumes this run."""
        return f"python -m semiseg.train --resume {shlex.quote(str(self.path))}"

    def evaluate_command(self, overrides: Sequence[str] = ()) -> str:
        """The command that evaluates this run."""
        return shlex.join(["python", "-m", "semiseg.evaluate", "--run", str(self.path), *overrides])

    @property
    def is_finished(self) -> bool:
        """Whether training has come to its end."""
        return self.checkpoint().is_file() and not self.training_state.is_file()

    def check_finished(self) -> None:
        """Raise ValueError, saying how to resume, where training has not come to its end."""
        if not self.is_finished:
            raise ValueError(f"{self.path} is unfinished: resume it with `{self.resume_command}`")

    def read_environment(self) -> dict[str, Any]:
        """Command, machine, versions and commit; none of a run too old to know. ValueError where damaged."""
        if not self.environment.is_file():
            return {}
        try:
            return dict(json.loads(self.environment.read_text()))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{self.environment} is damaged: {error}") from None

    def load_text(self) -> TextEmbeddings | None:
        """Text embeddings of the classes, where the method learned from them. ValueError where they are damaged."""
        return TextEmbeddings.load(self.text) if self.text.is_file() else None

    def check_dataset(self, dataset: Dataset) -> None:
        """Raise ValueError where a dataset is not like the one trained on; a run too old to know accepts any."""
        if not self.dataset.is_file():
            return
        difference = DatasetDescription.load(self.dataset).difference(DatasetDescription.of(dataset))
        if difference:
            raise ValueError(
                f"{self.path} was trained on another dataset: {difference} in the one given, "
                "accepted is one prepared alike"
            )

    def check_training_cases(
        self,
        names: Sequence[str],  # of all cases to train on, in their order
    ) -> None:
        """Raise ValueError where these are not the cases trained on so far; a run too old to know accepts any."""
        if not self.training_cases.is_file():
            return
        for number, (trained, given) in enumerate(zip_longest(read_list(self.training_cases), names), start=1):
            if trained != given:
                raise ValueError(
                    f"{self.path} is trained on {trained or 'no case'} as training case {number}, and the dataset "
                    f"given has {given or 'none'} there, accepted are the same cases in the same order"
                )

    def check_test_cases(self, dataset: Dataset) -> None:
        """Raise ValueError where a test case is one trained on; a run too old to know accepts all."""
        if not self.training_cases.is_file():
            return
        trained = {dataset.patient(name) for name in read_list(self.training_cases)}
        for name in dataset.evaluation_names("test"):
            if dataset.patient(name) in trained:
                raise ValueError(
                    f"{self.path} was trained on {dataset.patient(name)!r}, and the dataset given has the test case "
                    f"{name!r}, accepted are test cases of others"
                )

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep others from training this run until the block is left or the process dies.

        Raises ValueError where another trains it. Without file locks (some systems and file systems) nothing is locked.
        """
        if fcntl is None:
            yield
            return
        # A file that every run has and nothing replaces. For writing, because NFS locks no other.
        with self.config.open("r+b") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ValueError(f"{self.path} is being trained already") from None
            except OSError:
                pass
            yield

    def reopen(self, config: Config, device: torch.device) -> RunDirectory:
        """Clean up behind a process that was killed, and add what this one is, as `create` writes it."""
        remove_leftovers(self.path)
        first = self.read_environment()
        resumed = [*first.get("resumed", []), _session(config, device)]
        write_json(self.environment, {**first, "resumed": resumed})
        return self

    @staticmethod
    def check_new(config: Config) -> None:
        """Raise ValueError where `output` names a folder that holds something, OSError where none can be made."""
        if config.output is None:
            check_destination(_default_path(config))  # the run's own folder may have another number
            return
        path = _expanded(config.output)
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise _taken(path)
        check_destination(path / "config.yaml")

    @classmethod
    def create(cls, config: Config, device: torch.device) -> RunDirectory:
        """Make the folder; write the configuration as resolved, and command, precision, machine, versions and commit.

        Raises as `check_new` does.
        """
        cls.check_new(config)
        if config.output is None:
            path = _make_first_free(_default_path(config))
        else:
            path = _expanded(config.output)
            _make_folder(path)
        run = cls(path)
        try:
            write_new_text(run.config, yaml.safe_dump(config_to_mapping(config), sort_keys=False))
        except FileExistsError:  # another process was quicker
            raise _taken(path) from None
        write_json(run.environment, _session(config, device))
        return run

    @classmethod
    def open(cls, path: Path) -> tuple[RunDirectory, Config]:
        """An existing run and its configuration. Raises FileNotFoundError where there is none, ValueError where
        the configuration cannot be read."""
        run = cls(path)
        if not run.config.is_file():
            raise FileNotFoundError(f"{path} is no run directory: {run.config.name} is missing")
        values = read_mapping(run.config)
        try:
            return run, config_from_mapping(values)
        except ValueError as error:
            raise ValueError(f"{run.config}: {error}") from None


def _session(config: Config, device: torch.device) -> dict[str, Any]:
    # Whose Python it was, and where, is nobody else's business.
    command = shlex.join(["python", *sys.orig_argv[1:]])
    return {"command": command, "precision": precision(config, device), **environment()}


def _default_path(config: Config) -> Path:
    return Path("runs") / config.name


def _expanded(output: str) -> Path:
    # Not Path.expanduser, which raises RuntimeError where there is no such user or home.
    return Path(os.path.expanduser(output))


def _make_folder(path: Path) -> None:
    path.resolve().mkdir(parents=True, exist_ok=True)  # also of a link to a folder that is gone


def _taken(path: Path) -> ValueError:
    return ValueError(f"output is {path}, which exists already, accepted is a new or an empty folder")


def _make_first_free(path: Path) -> Path:
    _make_folder(path.parent)
    candidate, number = path, 1
    while True:
        try:
            candidate.mkdir()
            return candidate
        except FileExistsError:  # perhaps another process made it just now
            number += 1
            candidate = path.with_name(f"{path.name}-{number}")
