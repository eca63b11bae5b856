"""Overlap and surface distance of a segmentation, per case and over cases."""

from collections.abc import Iterator, Mapping, Sequence
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
    if spacing is not None and len(spacing) != truth.ndim:
        raise ValueError(f"spacing has {len(spacing)} values, accepted is one per axis, {truth.ndim}")
    unit = "voxel" if spacing is None else "mm"
    return {
        name: {"unit": unit, **_overlaps(predicted, true), **_class_distances(predicted, true, truth.shape, spacing)}
        for name, predicted, true in _structures(prediction, truth, class_names)
    }


def case_overlaps(
    prediction: np.ndarray,  # [*S] integer
    truth: np.ndarray,  # [*S] integer
    class_names: Sequence[str],  # the background first
) -> CaseMetrics:
    """What `case_metrics` gives without the distances, which take most of its time, and their unit."""
    return {
        name: _overlaps(predicted, true)
        for name, predicted, true in _structures(prediction, truth, class_names)
    }


def mean_dice(metrics: CaseMetrics) -> float:
    """Of a case, over its classes."""
    return float(np.mean([values["dice"] for values in metrics.values()]))


def _structures(
    prediction: np.ndarray,  # [*S]
    truth: np.ndarray,  # [*S]
    class_names: Sequence[str],
) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """Name of each foreground class, and where prediction and truth have it, both boolean and of the same shape.

    Cut to their joint box: nothing of the class is outside, so overlaps, surfaces and distances are the same in it.
    """
    if prediction.shape != truth.shape:
        raise ValueError(f"prediction has shape {prediction.shape}, accepted is the truth's, {truth.shape}")
    boxes = [ndimage.find_objects(array, max_label=len(class_names) - 1) for array in (prediction, truth)]
    for label, name in enumerate(class_names[1:], start=1):
        found = [by_label[label - 1] for by_label in boxes if by_label[label - 1] is not None]
        # Of a class that neither has, the whole image.
        box = tuple(
            slice(min(side.start for side in sides), max(side.stop for side in sides))
            for sides in zip(*found, strict=True)
        )
        yield name, prediction[box] == label, truth[box] == label


def _overlaps(predicted: np.ndarray, true: np.ndarray) -> dict[str, Any]:
    intersection, *sizes = (int(np.count_nonzero(voxels)) for voxels in (predicted & true, predicted, true))
    both_empty = not any(sizes)
    return {
        "empty_prediction": sizes[0] == 0,
        "empty_truth": sizes[1] == 0,
        "dice": 1.0 if both_empty else 2.0 * intersection / sum(sizes),
        "jaccard": 1.0 if both_empty else intersection / (sum(sizes) - intersection),
    }


def _class_distances(
    predicted: np.ndarray,
    true: np.ndarray,
    shape: tuple[int, ...],  # of the image
    spacing: Sequence[float] | None,
) -> dict[str, float]:
    present = predicted.any(), true.any()
    if not all(present):
        diagonal = float(np.linalg.norm(shape)) if any(present) else 0.0
        diagonal_mm = (
            float(np.linalg.norm(np.multiply(shape, spacing)))
            if any(present) and spacing is not None
            else diagonal
        )
        return {"hd95": diagonal, "asd": diagonal, "hd95_mm": diagonal_mm, "assd_mm": diagonal_mm}

    surfaces = np.argwhere(_surface(predicted)), np.argwhere(_surface(true))
    forward, backward = _surface_distances(*surfaces, spacing=(1.0,) * true.ndim)
    pooled = np.concatenate((forward, backward))
    if spacing is None:
        pooled_mm = pooled
    elif len(set(spacing)) == 1:
        pooled_mm = pooled * spacing[0]
    else:
        pooled_mm = np.concatenate(_surface_distances(*surfaces, spacing=spacing))
    return {
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
