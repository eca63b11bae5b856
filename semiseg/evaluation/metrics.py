"""Overlap and surface distance of a segmentation, per case and over cases."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from scipy import ndimage
from scipy.spatial import KDTree

OVERLAPS = ("dice", "jaccard")
DISTANCES = ("hd95", "asd", "hd95_mm", "assd_mm")
METRICS = OVERLAPS + DISTANCES

CaseMetrics = dict[str, dict[str, Any]]  # class name -> metric -> value


def case_metrics(
    prediction: np.ndarray,  # [*S] integer
    truth: np.ndarray,  # [*S] integer
    class_names: Sequence[str],  # of label c: class_names[c]; class_names[0], the background, is left out
    spacing: Sequence[float] | None = None,  # mm per voxel along each axis
) -> CaseMetrics:
    """Metrics of each foreground class, as plain numbers ready for JSON.

    dice, jaccard: from 0 to 1.
    hd95, asd: voxels, as medpy defines them. hd95 is the 95th percentile of the surface distances of both
        directions pooled; asd is the mean distance from the prediction's surface to the truth's, not back.
    hd95_mm, assd_mm: mm; the 95th percentile and the mean of both directions pooled. Without spacing they are
        in voxels, and `unit` is "voxel" instead of "mm".
    empty_prediction, empty_truth: whether the class is missing there. If from one of the two, Dice and
        Jaccard are 0 and the distances the diagonal of the image; if from both, 1 and 0.
    A structure's surface is its voxels with a face neighbour outside of it; beyond the image is outside.
    ValueError for unequal shapes or a spacing of another length.
    """
    if prediction.shape != truth.shape:
        raise ValueError(f"prediction has shape {prediction.shape}, accepted is the truth's, {truth.shape}")
    if spacing is not None and len(spacing) != truth.ndim:
        raise ValueError(f"spacing has {len(spacing)} values, accepted is one per axis, {truth.ndim}")
    labels = len(class_names) - 1
    boxes = [ndimage.find_objects(array, max_label=labels) for array in (prediction, truth)]
    return {
        name: _class_metrics(prediction, truth, label, (boxes[0][label - 1], boxes[1][label - 1]), spacing)
        for label, name in enumerate(class_names)
        if label > 0
    }


def _class_metrics(
    prediction: np.ndarray,
    truth: np.ndarray,
    label: int,
    boxes: tuple[tuple[slice, ...] | None, tuple[slice, ...] | None],  # of the label in prediction and truth
    spacing: Sequence[float] | None,
) -> dict[str, Any]:
    metrics: dict[str, Any] = {
        "unit": "voxel" if spacing is None else "mm",
        "empty_prediction": boxes[0] is None,
        "empty_truth": boxes[1] is None,
    }
    if boxes[0] is None or boxes[1] is None:
        both = boxes[0] is boxes[1]
        diagonal = 0.0 if both else float(np.linalg.norm(truth.shape))
        diagonal_mm = (
            diagonal if both or spacing is None else float(np.linalg.norm(np.multiply(truth.shape, spacing)))
        )
        metrics |= dict.fromkeys(OVERLAPS, float(both))
        return metrics | {"hd95": diagonal, "asd": diagonal, "hd95_mm": diagonal_mm, "assd_mm": diagonal_mm}

    # Nothing of the class is outside of the joint box, so surfaces and distances are the same in it.
    box = tuple(
        slice(min(a.start, b.start), max(a.stop, b.stop)) for a, b in zip(boxes[0], boxes[1], strict=True)
    )
    predicted, true = prediction[box] == label, truth[box] == label
    intersection = np.count_nonzero(predicted & true)
    size = np.count_nonzero(predicted) + np.count_nonzero(true)
    surfaces = np.argwhere(_surface(predicted)), np.argwhere(_surface(true))
    forward, backward = _surface_distances(*surfaces, spacing=(1.0,) * truth.ndim)
    pooled = np.concatenate((forward, backward))
    if spacing is None:
        pooled_mm = pooled
    elif len(set(spacing)) == 1:
        pooled_mm = pooled * spacing[0]
    else:
        pooled_mm = np.concatenate(_surface_distances(*surfaces, spacing=spacing))
    return metrics | {
        "dice": 2.0 * intersection / size,
        "jaccard": intersection / (size - intersection),
        "hd95": float(np.percentile(pooled, 95)),
        "asd": float(forward.mean()),
        "hd95_mm": float(np.percentile(pooled_mm, 95)),
        "assd_mm": float(pooled_mm.mean()),
    }


def _surface(structure: np.ndarray) -> np.ndarray:
    """Voxels of a boolean structure with a face neighbour outside of it or of the array."""
    interior = structure.copy()
    for axis in range(structure.ndim):
        inner, whole = np.moveaxis(interior, axis, 0), np.moveaxis(structure, axis, 0)
        inner[1:] &= whole[:-1]
        inner[:-1] &= whole[1:]
        inner[0] = inner[-1] = False
    return structure & ~interior


def _surface_distances(
    prediction: np.ndarray,  # [N, axes] surface voxels
    truth: np.ndarray,  # [M, axes] surface voxels
    spacing: Sequence[float],
) -> tuple[np.ndarray, np.ndarray]:  # [N], [M]
    """Distance of each surface voxel of the prediction to the truth's surface, and the other way round."""
    return _distances(prediction, truth, spacing), _distances(truth, prediction, spacing)


def _distances(points: np.ndarray, surface: np.ndarray, spacing: Sequence[float]) -> np.ndarray:
    # For surfaces of voxels the defaults, balanced trees with small leaves, take 1.7 times as long.
    tree = KDTree(surface * spacing, leafsize=32, balanced_tree=False)
    _, nearest = tree.query(points * spacing, workers=torch.get_num_threads())
    # Differences of voxels are exact, those of their places are not.
    return np.linalg.norm((points - surface[nearest]) * spacing, axis=1)


def summarise(
    per_case: Mapping[str, CaseMetrics],  # case name -> result of `case_metrics`, the same classes in each
) -> dict[str, Any]:
    """Mean and population standard deviation (numpy's `std`, ddof 0) of every metric over the cases.

    classes: per class {metric: {mean, sd}} and in how many cases the prediction and the truth are empty.
    mean: {metric: {mean, sd}} over cases of a case's mean over the classes.
    empty_prediction, empty_truth: counts over all cases and classes; such cases are part of the means.
    unit: of hd95_mm and assd_mm: "mm", "voxel", or "mixed" where only some cases have a spacing.
    ValueError without a case.
    """
    if not per_case:
        raise ValueError("per_case holds no case, accepted is at least one")
    cases = list(per_case.values())
    names = list(cases[0])
    values = {
        metric: np.array([[case[name][metric] for name in names] for case in cases]) for metric in METRICS
    }
    empties = {
        flag: np.array([[case[name][flag] for name in names] for case in cases])
        for flag in ("empty_prediction", "empty_truth")
    }
    units = {case[name]["unit"] for case in cases for name in names}
    return {
        "num_cases": len(cases),
        "unit": units.pop() if len(units) == 1 else "mixed",
        "classes": {
            name: {metric: _mean_and_sd(values[metric][:, index]) for metric in METRICS}
            | {flag: int(counts[:, index].sum()) for flag, counts in empties.items()}
            for index, name in enumerate(names)
        },
        "mean": {metric: _mean_and_sd(values[metric].mean(axis=1)) for metric in METRICS},
        **{flag: int(counts.sum()) for flag, counts in empties.items()},
    }


def _mean_and_sd(values: np.ndarray) -> dict[str, float]:
    return {"mean": float(values.mean()), "sd": float(values.std())}
