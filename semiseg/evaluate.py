"""`python -m semiseg.evaluate --run DIR [evaluation.key=value ...]`: apply a run's checkpoints to whole test volumes."""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from semiseg.atomic import write_json
from semiseg.commands import command
from semiseg.config import Config, overridden
from semiseg.data import Case
from semiseg.destinations import check_destination
from semiseg.engine.allocator import restart_with_tuned_heap
from semiseg.engine.checkpoint import load_checkpoint
from semiseg.engine.cost import method_cost
from semiseg.engine.run_directory import EVALUATED_WITH, RunDirectory
from semiseg.engine.trainer import build_method, choose_device, open_configured_dataset
from semiseg.evaluation.evaluator import evaluate_cases
from semiseg.evaluation.metrics import summarise
from semiseg.evaluation.pictures import draw_pictures, prediction_pictures
from semiseg.evaluation.tables import results_table
from semiseg.reporting.run_report import write_report

SELECTED_ON_TEST = "the checkpoint was selected on the test set: these are not figures of unseen data"


@command
def main(arguments: list[str] | None = None) -> None:
    """Evaluate the checkpoints of a run on the test split and write results.json, the pictures and the report."""
    parser = argparse.ArgumentParser("python -m semiseg.evaluate", description=__doc__)
    parser.add_argument("--run", required=True, type=Path, help="a run directory")
    parser.add_argument(
        "overrides", nargs="*", metavar="evaluation.key=value", help="e.g. evaluation.head=mean"
    )
    options = parser.parse_args(arguments)
    run, config = RunDirectory.open(options.run)
    run.check_finished()
    check_destination(run.results)
    config = overridden(config, options.overrides, ("evaluation", *EVALUATED_WITH))
    if arguments is None and choose_device(config.training.device).type == "cpu":
        restart_with_tuned_heap()
    print(results_table(evaluate(config, run)))
    print(f"written to {run.results} and {run.report}")


def evaluate(config: Config, run: RunDirectory) -> dict[str, Any]:
    """Write results.json: the reported checkpoint and, if they are of another iteration, the last and the best
    validation checkpoint."""
    device = choose_device(config.training.device)
    dataset = open_configured_dataset(config)
    run.check_dataset(dataset)
    run.check_test_cases(dataset)
    text = run.load_text()
    channels = len(dataset.preprocessing.channels)
    method = build_method(config, len(dataset.class_names), device, text, channels)
    reported = config.evaluation.select
    # First, as what is wrong with it is to be known before the others are evaluated.
    iteration = load_checkpoint(run.checkpoint(reported), method, device)["iteration"]
    others = [name for name in ("last", "validation") if name != reported and run.checkpoint(name).is_file()]
    evaluated: dict[str, Any] = {}
    labels: dict[str, bytes] = {}  # digest of every case
    for name in [*others, reported]:  # the reported one last: its predictions and its network are drawn
        metadata = load_checkpoint(run.checkpoint(name), method, device)
        if name != reported and metadata["iteration"] == iteration:
            continue  # the same weights
        cases, maps = {}, {}
        for case, prediction, metrics in evaluate_cases(method, dataset, "test", config, device):
            cases[case.name] = metrics
            labels[case.name] = hashlib.sha256(case.label.tobytes()).digest()
            # Uncompressed, the maps of many large scans would fill the memory.
            maps[case.name] = zlib.compress(prediction.tobytes(), level=1), prediction.shape
        evaluated[name] = {
            "iteration": int(metadata["iteration"]),
            "summary": summarise(cases),
            "cases": cases,
        }
    results = {
        **_about(config, dataset.class_names, labels),
        **({"text": text.origin} if text is not None else {}),
        "cost": method_cost(method, config.training.patch_size, channels),
        **evaluated.pop(reported),
        "other_checkpoints": evaluated,
    }
    for path in (*prediction_pictures(run), run.report):  # of an earlier evaluation
        path.unlink(missing_ok=True)
    write_json(run.results, results)

    def predicted(case: Case) -> np.ndarray:
        content, shape = maps[case.name]
        return np.frombuffer(zlib.decompress(content), np.uint8).reshape(shape)

    draw_pictures(run, config, method, dataset, device, cases, predicted)
    write_report(run, config, run.report)
    return results


def _about(
    config: Config,
    class_names: Sequence[str],
    labels: Mapping[str, bytes],  # digest of every case
) -> dict[str, Any]:
    """What was trained, and how and on which cases it is evaluated."""
    return {
        "name": config.name,
        "method": config.method.name,
        "preset": config.preset,
        "dataset": config.dataset.name,
        "labelled": config.dataset.labelled,
        "seed": config.seed,
        "classes": list(class_names),
        # What tells the cases of two datasets apart that have the same names, in whatever order.
        "labels": hashlib.sha256(b"".join(labels[name] for name in sorted(labels))).hexdigest(),
        "evaluation": dataclasses.asdict(config.evaluation),
        "checkpoint": config.evaluation.select,
        **({"warning": SELECTED_ON_TEST} if config.evaluation.select == "test" else {}),
    }


if __name__ == "__main__":
    main()
