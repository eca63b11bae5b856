"""`python -m semiseg.evaluate --run DIR [evaluation.key=value ...]`: apply a run's checkpoints to whole test volumes."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import torch

from semiseg.commands import command
from semiseg.config import Config, config_from_mapping, config_to_mapping, merge, parse_overrides
from semiseg.data import Dataset
from semiseg.engine.atomic import write_json
from semiseg.engine.checkpoint import load_checkpoint
from semiseg.engine.cost import method_cost
from semiseg.engine.run_directory import RunDirectory
from semiseg.engine.trainer import build_method, choose_device, open_configured_dataset
from semiseg.evaluation.evaluator import predictions
from semiseg.evaluation.figures import overlay
from semiseg.evaluation.metrics import case_metrics, summarise
from semiseg.evaluation.tables import results_table
from semiseg.methods import Method
from semiseg.text import TextEmbeddings

SELECTED_ON_TEST = "the checkpoint was selected on the test set: these are not figures of unseen data"


@command
def main(arguments: list[str] | None = None) -> None:
    """Evaluate the checkpoints of a run on the test split and write results.json and the overlays."""
    parser = argparse.ArgumentParser("python -m semiseg.evaluate", description=__doc__)
    parser.add_argument("--run", required=True, type=Path, help="a run directory")
    parser.add_argument(
        "overrides", nargs="*", metavar="evaluation.key=value", help="e.g. evaluation.head=mean"
    )
    options = parser.parse_args(arguments)
    run, config = RunDirectory.open(options.run)
    given = parse_overrides(options.overrides)
    if set(given) - {"evaluation", "dataset"}:
        raise ValueError(
            f"overrides {', '.join(options.overrides)}: accepted are keys of evaluation and dataset"
        )
    config = config_from_mapping(merge(config_to_mapping(config), given))
    print(results_table(evaluate(config, run)))
    print(f"written to {run.results}")


def evaluate(config: Config, run: RunDirectory) -> dict[str, Any]:
    """Write results.json: the reported checkpoint, and beside the last one the best on the validation split."""
    device = choose_device(config.training.device)
    dataset = open_configured_dataset(config)
    text = TextEmbeddings.load(run.text) if run.text.is_file() else None
    method = build_method(config, len(dataset.class_names), device, text)
    reported = config.evaluation.select
    names = [reported] + [
        name for name in ("last", "validation") if name != reported and run.checkpoint(name).is_file()
    ]
    evaluated = {}
    for name in names:
        metadata = load_checkpoint(run.checkpoint(name), method, device)
        result = evaluate_checkpoint(config, method, dataset, device, run if name == reported else None)
        evaluated[name] = {"iteration": int(metadata["iteration"]), **result}
    results = {
        "name": config.name,
        "method": config.method.name,
        "preset": config.preset,
        "dataset": config.dataset.name,
        "labelled": config.dataset.labelled,
        "seed": config.seed,
        "classes": list(dataset.class_names),
        **({"text": text.origin} if text is not None else {}),
        "cost": method_cost(method, config.training.patch_size),
        "evaluation": dataclasses.asdict(config.evaluation),
        "checkpoint": reported,
        **({"warning": SELECTED_ON_TEST} if reported == "test" else {}),
        **evaluated.pop(reported),
        "other_checkpoints": evaluated,
    }
    write_json(run.results, results)
    return results


def evaluate_checkpoint(
    config: Config, method: Method, dataset: Dataset, device: torch.device, run: RunDirectory | None
) -> dict[str, Any]:
    """Metrics of every test case and their summary; with a run, also overlays of the best, median and worst case."""
    cases, maps = {}, {}
    for case, prediction in predictions(method, dataset, "test", config, device):
        cases[case.name] = case_metrics(prediction, case.label, dataset.class_names, case.spacing)
        maps[case.name] = prediction
    if run is not None:
        draw_overlays(dataset, cases, maps, run)
    return {"summary": summarise(cases), "cases": cases}


def draw_overlays(
    dataset: Dataset, cases: dict[str, Any], maps: dict[str, np.ndarray], run: RunDirectory
) -> None:
    """Truth and prediction on the best, median and worst case by mean Dice."""
    dice = {
        name: float(np.mean([values["dice"] for values in metrics.values()]))
        for name, metrics in cases.items()
    }
    ranked = sorted(dice, key=dice.__getitem__)
    chosen = {"worst": ranked[0], "median": ranked[len(ranked) // 2], "best": ranked[-1]}
    run.overlays.mkdir(exist_ok=True)
    for case in dataset.evaluation_cases("test"):
        for label, name in chosen.items():
            if name == case.name:
                title = f"{label}: {name}, mean Dice {dice[name]:.3f}"
                overlay(case, maps[name], run.overlays / f"{label}.png", title, dataset.class_names)


if __name__ == "__main__":
    main()
