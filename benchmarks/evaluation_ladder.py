"""From a plain evaluation to this one, lever by lever: python benchmarks/evaluation_ladder.py [--results FILE]

The plain evaluation of a volume is what released code does: the training network on one window after the other, in
float32, its softmax added up in numpy, then every metric from erosions and distance transforms of the whole volume. Each
rung adds one lever to those before it, in a process of its own; its weights are random. The volume is a part of the first
test volume of the left atrium, and the second of two predictions of it is what counts; it is looked for in $SEMISEG_DATA.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from typing import Any
from unittest import mock

import numpy as np
import torch
from ladder import climb, kernels_of, prepare
from scipy import ndimage

from semiseg.config import Config
from semiseg.engine.trainer import build_method, open_configured_dataset
from semiseg.evaluation.evaluator import predict_case, validation_config
from semiseg.evaluation.metrics import case_metrics
from semiseg.evaluation.sliding_window import window_starts
from semiseg.methods import METHODS, Method
from semiseg.models import folding
from semiseg.models.two_branches import TwoDecoders
from semiseg_kernels import fix_weight

CPU = torch.device("cpu")
# Voxels: three windows along each axis at the paper's stride.
PART = (slice(0, 148), slice(0, 148), slice(0, 88))
SHIFT = (3, 2, 1)  # voxels between the truth and what the metrics are timed on

# From the plain evaluation to the full one; half overlap belongs to evaluations during training.
LEVERS = ("kept heap", "batched windows of decoder A", "fused classifier", "channels last", "own convolutions",
          "folded batch normalisation", "fixed weights", "tight heap", "huge pages", "distances between surfaces", "half overlap", "bfloat16")  # fmt: skip
WORKLOADS = {"la_mper": (), "la_vclipseg": ("method.text=random",)}


@torch.no_grad()
def plain_prediction(
    method: Method,
    image: np.ndarray,  # [M, *S]
    config: Config,
) -> np.ndarray:  # [*S]
    """Window by window, everything the network has computed for each, added up in numpy."""
    assert config.evaluation.stride is not None
    sides = image.shape[1:]
    axes = zip(sides, config.training.patch_size, config.evaluation.stride, strict=True)
    scores, counts = np.zeros((method.num_classes, *sides), np.float32), np.zeros(sides, np.float32)
    for corner in itertools.product(*(window_starts(*axis) for axis in axes)):
        extents = zip(corner, config.training.patch_size, strict=True)
        window = tuple(slice(first, first + side) for first, side in extents)
        network, patch = method.network, torch.from_numpy(image[(slice(None), *window)])[None]
        logits = network.branches(patch)[0] if isinstance(network, TwoDecoders) else network(patch)[0]
        scores[(slice(None), *window)] += logits.softmax(1)[0].numpy()
        counts[window] += 1
    return (scores / counts).argmax(0)


def plain_metrics(prediction: np.ndarray, truth: np.ndarray) -> tuple[float, float, float, float]:
    """Dice, Jaccard, 95HD and ASD in voxels, each from the whole volume, each distance by its own transform."""

    def to_surface(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        surface_a, surface_b = (mask & ~ndimage.binary_erosion(mask) for mask in (a, b))
        return ndimage.distance_transform_edt(~surface_b)[surface_a]

    both = np.count_nonzero(prediction & truth)
    dice = 2 * both / (np.count_nonzero(prediction) + np.count_nonzero(truth))
    jaccard = both / np.count_nonzero(prediction | truth)
    hausdorff = np.percentile(np.hstack([to_surface(prediction, truth), to_surface(truth, prediction)]), 95)
    return dice, jaccard, float(hausdorff), float(to_surface(prediction, truth).mean())


def measure(workload: str, levers: Sequence[str]) -> dict[str, Any]:
    """Seconds of predicting the part of the volume and of its metrics, and how many windows it has."""
    config = prepare(workload, WORKLOADS[workload], levers)
    if "half overlap" in levers:
        config = validation_config(config)
    dataset = open_configured_dataset(config)
    case = next(iter(dataset.evaluation_cases("test")))
    image, truth = case.image[(slice(None), *PART)], case.label[PART]
    shifted = np.roll(truth, SHIFT, axis=(0, 1, 2))
    torch.manual_seed(config.seed)
    method = build_method(
        config, len(dataset.class_names), CPU, METHODS[config.method.name].text(config, dataset.class_names)
    ).eval()
    batched = "batched windows of decoder A" in levers
    fix = fix_weight if "fixed weights" in levers else lambda weight: None
    with mock.patch.object(folding, "fix_weight", fix):
        # Once for all volumes, as an evaluation does.
        folded = folding.fold_batch_norm(method) if "folded batch normalisation" in levers else method

    def predict(image: np.ndarray) -> None:
        if not batched:
            plain_prediction(method, image, config)
            return
        predict_case(folded, image, config, CPU)

    with kernels_of(levers):
        predict(image)  # An evaluation has many volumes, and memory is the process's own after the first.
        started = time.perf_counter()
        predict(image)
        predicted = time.perf_counter()
    if "distances between surfaces" in levers:
        case_metrics(shifted, truth, dataset.class_names)
    else:
        plain_metrics(shifted == 1, truth == 1)
    ended = time.perf_counter()
    assert config.evaluation.stride is not None
    axes = zip(truth.shape, config.training.patch_size, config.evaluation.stride, strict=True)
    windows = int(np.prod([len(window_starts(*axis)) for axis in axes]))
    return {
        "seconds": ended - started,
        "seconds_of_prediction": predicted - started,
        "seconds_of_metrics": ended - predicted,
        "windows": windows,
    }


if __name__ == "__main__":
    assert __doc__ is not None
    climb(__doc__, tuple(WORKLOADS), LEVERS, measure)
