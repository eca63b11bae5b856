"""Runs against each other: seeds of one configuration together, and differences case by case."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from semiseg.config import Config, config_to_mapping, flatten
from semiseg.data.description import DatasetDescription
from semiseg.engine.run_directory import RunDirectory
from semiseg.evaluation.metrics import OVERLAPS
from semiseg.reporting.results import load_results

# No part of what a configuration is.
NOT_COMPARED = (
    "seed",
    "output",
    "dataset.root",
    "training.device",
    "training.checkpoint_minutes",
    "evaluation.batch",
    "preprocessing.orientation",  # always the same for one dataset, but older versions did not say it of all
)


@dataclass(frozen=True)
class EvaluatedRun:
    """A run with its results."""

    path: Path
    config: Config  # as trained
    results: Mapping[str, Any]  # results.json
    description: DatasetDescription | None  # of the data it was trained on; None: of a run too old to know

    @classmethod
    def open(cls, path: Path) -> EvaluatedRun:
        """Read a run directory. Raises as `load_results`, `RunDirectory.open` and `DatasetDescription.load`."""
        run, config = RunDirectory.open(path)
        description = DatasetDescription.load(run.dataset) if run.dataset.is_file() else None
        return cls(path, config, load_results(run), description)

    @property
    def settings(self) -> dict[str, str]:
        """Every dotted key of the configuration as trained and evaluated, and of the data's preprocessing, in JSON."""
        mapping = {**config_to_mapping(self.config), "evaluation": self.results["evaluation"]}
        if self.description is not None:
            mapping["preprocessing"] = dataclasses.asdict(self.description.preprocessing)
        return {key: json.dumps(value) for key, value in flatten(mapping).items()}

    @property
    def test_set(self) -> tuple[Any, ...]:
        """What must be the same in runs that are compared."""
        dataset = self.config.dataset
        return (
            dataset.name,
            dataset.cohort_seed,
            tuple(self.results["classes"]),
            frozenset(self.results["cases"]),
        )

    def has_labels_of(self, other: EvaluatedRun) -> bool:
        """Whether both were measured by the same labels, as far as can be told: results of older versions do not say,
        and data prepared otherwise have others."""
        if "labels" not in self.results or "labels" not in other.results or self.description != other.description:
            return True
        return self.results["labels"] == other.results["labels"]


@dataclass(frozen=True)
class SeedGroup:
    """The runs of one configuration, which differ in their seeds."""

    label: str
    runs: tuple[EvaluatedRun, ...]

    def scores(
        self, metric: str, cases: Sequence[str], classes: Sequence[str]
    ) -> np.ndarray:  # [runs, cases], each the mean over the classes
        """A metric of every run and case."""
        return np.array(
            [
                [np.mean([run.results["cases"][case][name][metric] for name in classes]) for case in cases]
                for run in self.runs
            ]
        )

    def statistics(self, metric: str, cases: Sequence[str], classes: Sequence[str]) -> dict[str, float]:
        """Mean, and the population standard deviation of the seeds' means, or with one seed of the cases."""
        scores = self.scores(metric, cases, classes)
        spread = scores.mean(axis=1) if len(self.runs) > 1 else scores[0]
        return {"mean": float(scores.mean()), "sd": float(spread.std())}


@dataclass(frozen=True)
class Difference:
    """One group of seeds less the first, case by case."""

    mean: float
    sd: float  # population standard deviation over the cases
    p: float  # Wilcoxon signed-rank test, two-sided
    better: int  # cases
    worse: int  # cases


def paired_difference(
    first: np.ndarray,  # [cases]
    other: np.ndarray,  # [cases]
    metric: str,
) -> Difference:
    """How a metric of the same cases differs; higher is better for overlaps, lower for distances."""
    differences = other - first
    gain = differences if metric in OVERLAPS else -differences
    p = float(stats.wilcoxon(differences).pvalue) if differences.any() else 1.0
    better, worse = int((gain > 0).sum()), int((gain < 0).sum())
    return Difference(float(differences.mean()), float(differences.std()), p, better, worse)


def seed_groups(runs: Sequence[EvaluatedRun]) -> list[SeedGroup]:
    """Group runs by configuration and data, in the order given; if all have the same, every run stands for itself.

    Raises ValueError where a run was tested on other cases or labels than the first, is given twice, or has the seed of
    another in its group: two such runs say nothing of the spread between seeds.
    """
    for number, run in enumerate(runs):
        if run.path.resolve() in [other.path.resolve() for other in runs[:number]]:
            raise ValueError(f"{run.path} is given twice, accepted are different runs")
        if run.test_set != runs[0].test_set:
            raise ValueError(
                f"{run.path} was tested on {_test_set(run)}, {runs[0].path} on {_test_set(runs[0])}; "
                "expected the same test cases"
            )
        if not run.has_labels_of(runs[0]):
            raise ValueError(
                f"the test cases of {run.path} have the names of those of {runs[0].path}, but other labels; "
                "expected the same test cases"
            )
    groups: dict[tuple[Any, ...], list[EvaluatedRun]] = {}
    for run in runs:
        identity = tuple((key, value) for key, value in run.settings.items() if key not in NOT_COMPARED)
        groups.setdefault(identity, []).append(run)
    if len(groups) == 1:
        return [SeedGroup(str(run.path), (run,)) for run in runs]
    for group in groups.values():
        by_seed: dict[int, EvaluatedRun] = {}
        for run in group:
            other = by_seed.setdefault(run.config.seed, run)
            if other is not run:
                raise ValueError(
                    f"{other.path} and {run.path} have the same configuration and the seed {run.config.seed}; "
                    "expected runs of one configuration to have seeds of their own"
                )
    return [
        SeedGroup(label, tuple(group))
        for label, group in zip(_labels(list(groups.values())), groups.values(), strict=True)
    ]


def _test_set(run: EvaluatedRun) -> str:
    cases, classes = run.results["cases"], run.results["classes"]
    cohort = f" (cohort {run.config.dataset.cohort_seed})" if run.config.dataset.name == "phantom" else ""
    return f"{len(cases)} cases of {run.config.dataset.name}{cohort}, from {min(cases)}, with {len(classes)} classes"


def _labels(groups: Sequence[Sequence[EvaluatedRun]]) -> list[str]:
    """Names of configurations, with what tells those of one name apart."""
    labels = []
    for group in groups:
        name, settings = group[0].config.name, group[0].settings
        rivals = [other[0].settings for other in groups if other[0].config.name == name]
        differing = [
            f"{key}={value}"
            for key, value in settings.items()
            if key not in NOT_COMPARED and any(rival.get(key) != value for rival in rivals)
        ]
        labels.append(f"{name} ({', '.join(differing)})" if differing else name)
    return labels
