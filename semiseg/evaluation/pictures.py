"""The pictures of a run that take its predictions: overlays, surfaces and the map of embeddings."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch

from semiseg.config import Config
from semiseg.data import Case, Dataset
from semiseg.engine.run_directory import RunDirectory
from semiseg.evaluation.embedding_map import embedding_map, sample_embeddings
from semiseg.evaluation.figures import overlay
from semiseg.evaluation.metrics import CaseMetrics, mean_dice
from semiseg.evaluation.surfaces import surfaces
from semiseg.methods import Method

SHOWN = ("best", "median", "worst")
VOXELS = 1500  # on the map of embeddings
SEED = 0


def shown_cases(cases: Mapping[str, CaseMetrics]) -> dict[str, str]:
    """Names of the best, median and worst case by mean Dice."""
    ranked = sorted(cases, key=lambda name: mean_dice(cases[name]))
    return dict(zip(SHOWN, (ranked[-1], ranked[len(ranked) // 2], ranked[0]), strict=True))


def prediction_pictures(run: RunDirectory) -> list[Path]:
    """Where `draw_pictures` puts them."""
    folders = (run.overlays, run.surfaces)
    return [folder / f"{shown}.png" for folder in folders for shown in SHOWN] + [run.embedding_map]


def draw_pictures(
    run: RunDirectory,
    config: Config,
    method: Method,
    dataset: Dataset,
    device: torch.device,
    cases: Mapping[str, CaseMetrics],  # of the test split
    predict: Callable[[Case], np.ndarray],  # class map [*S] of a case
) -> None:
    """Overlays and surfaces of the best, median and worst test case, and a map of embeddings from the three.

    The network is left in eval mode. ValueError where the dataset lacks one of the cases.
    """
    method.network.eval()
    shown = shown_cases(cases)
    names = set(shown.values())
    missing = names.difference(dataset.evaluation_names("test"))
    if missing:
        raise ValueError(
            f"the test split of {config.dataset.name} has no case {missing.pop()}, which the results name"
        )
    per_class = VOXELS // (len(names) * method.num_classes)
    generator = np.random.default_rng(SEED)
    samples = []
    for folder in (run.overlays, run.surfaces):
        folder.mkdir(exist_ok=True)
    for case in dataset.evaluation_cases("test", names):
        prediction, metrics = predict(case), cases[case.name]
        for which in (which for which, name in shown.items() if name == case.name):
            title = f"{which}: {case.name}, mean Dice {mean_dice(metrics):.3f}"
            for folder, draw in ((run.overlays, overlay), (run.surfaces, surfaces)):
                draw(
                    case,
                    prediction,
                    metrics,
                    folder / f"{which}.png",
                    title,
                    dataset.class_names,
                    dataset.preprocessing.orientation,
                )
        samples.append(sample_embeddings(method, case, config, device, per_class, generator))
    embeddings, labels = (np.concatenate(parts) for parts in zip(*samples, strict=True))
    embedding_map(embeddings, labels, method.prototypes, dataset.class_names, run.embedding_map)
