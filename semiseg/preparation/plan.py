"""Spacing, intensities, patch and configurations that follow from what is in a dataset."""

import functools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from semiseg.data.preprocessing import Preprocessing
from semiseg.models.vnet import SIDE_MULTIPLE
from semiseg.preparation.survey import ORIENTATION, Facts

PATCH_VOXELS = 96**3  # at most
PERCENTILES = (0.5, 99.5)  # of the labelled voxels of a CT: what lies outside is cut off
SAME_SIDES = 1.2  # spacings of two axes whose ratio is below may be exchanged by a rotation
OTHER_SIDE = {"left": "right", "l": "r", "lt": "rt"}  # of the body
OTHER_SIDE |= {right: left for left, right in OTHER_SIDE.items()}
# In a name of small letters; what is short counts only where it stands alone.
SIDE = re.compile("left|right|(?<![a-z0-9])(?:l|r|lt|rt)(?![a-z0-9])")
VALIDATION_INTERVAL = 200  # iterations, as with ACDC
LEARNING_RATE_STEP = 6000  # iterations between tenfold cuts, more than on the left atrium


@dataclass(frozen=True)
class Plan:
    """How a dataset is brought to one form and trained on."""

    preprocessing: Preprocessing
    patch: tuple[int, ...]  # voxels
    augmentation: str


def plan(
    facts: Sequence[Facts],  # of all scans that are kept
    labelled: Sequence[Facts],  # of those whose labels may be used
    class_names: Sequence[str],
    modality: str,  # ct or mr
    spacing: tuple[float, ...] | None = None,  # mm; None: the median
) -> Plan:
    """Choose for a dataset. Raises ValueError where a CT's labelled voxels all have one intensity."""
    if spacing is None:
        spacing = tuple(float(f"{size:.4g}") for size in np.median([one.spacing for one in facts], axis=0))
    shapes = [np.divide(one.extent, spacing) for one in facts]
    names = {name.lower() for name in class_names}
    has_sides = any(_other_side(name) in names - {name} for name in names)
    in_plane = max(spacing[:2]) / min(spacing[:2])
    return Plan(
        _preprocessing(labelled, modality, spacing),
        patch_size(tuple(np.median(shapes, axis=0)), spacing),
        "crop" if has_sides or in_plane > SAME_SIDES else "crop_dihedral",
    )


def patch_size(
    shape: tuple[float, ...],  # voxels of a usual scan
    spacing: tuple[float, ...],  # mm
) -> tuple[int, ...]:
    """A patch like the scan, then smaller along its longest side in mm until it is within the budget."""
    sides = [SIDE_MULTIPLE * max(1, math.floor(side / SIDE_MULTIPLE + 0.5)) for side in shape]
    while math.prod(sides) > PATCH_VOXELS:
        extents = [
            side * size if side > SIDE_MULTIPLE else 0 for side, size in zip(sides, spacing, strict=True)
        ]
        sides[int(np.argmax(extents))] -= SIDE_MULTIPLE
    return tuple(sides)


def configurations(
    plan: Plan,
    root: Path,  # of the prepared dataset
    labelled: int,
    unlabelled: int,  # cases
    validated: bool,  # whether there is a validation list
) -> Mapping[str, Mapping[str, Any]]:
    """What `python -m semiseg.train --config` takes, by method; without unlabelled cases only the baseline.

    Schedules and batches are those of the papers on the left atrium, but that learning rates are cut less often.
    """
    configuration = functools.partial(_configuration, plan, root, labelled, validated)
    supervised = {"name": "supervised", "iterations": 17000, "learning_rate_step": LEARNING_RATE_STEP}
    configs = {"supervised": configuration(supervised, batch=4)}
    if not unlabelled:
        return configs
    mper = {
        "name": "mper",
        "pretraining_iterations": 2000,
        "iterations": 15000,
        "zero_box": [side * 2 // 3 for side in plan.patch],
        "contrast_weight": 0.02,
        "ramp_up_iterations": 6000,
        "learning_rate_step": LEARNING_RATE_STEP,
    }
    # Random embeddings of the class names need no download; text: clip learns from CLIP's.
    vclipseg = {"name": "vclipseg", "text": "random", "iterations": 15000, "ramp_up_iterations": 6000}
    return {
        **configs,
        "mper": configuration(mper, batch=4, base="base/mper"),
        "vclipseg": configuration(vclipseg, batch=2, base="base/vclipseg"),
    }


def _configuration(
    plan: Plan,
    root: Path,
    labelled: int,
    validated: bool,
    method: Mapping[str, Any],
    batch: int,  # of labelled and of unlabelled images
    base: str | None = None,
) -> dict[str, Any]:
    return {
        **({"base": base} if base else {}),
        "name": f"{root.name}_{method['name']}",
        "dataset": {"name": "own", "root": str(root), "labelled": labelled, "augmentation": plan.augmentation},
        "network": {"name": "vnet", "filters": [16], "dropout": [0.5]},
        "training": {"patch_size": list(plan.patch), "labelled_batch": batch, "unlabelled_batch": batch},
        "method": method,
        "evaluation": {
            "stride": [side // 2 for side in plan.patch],
            **({"validation_interval": VALIDATION_INTERVAL} if validated else {}),
        },
    }


def _preprocessing(labelled: Sequence[Facts], modality: str, spacing: tuple[float, ...]) -> Preprocessing:
    if modality == "mr":
        return Preprocessing(ORIENTATION, spacing)
    foreground = np.concatenate([one.foreground for one in labelled])
    low, high = (float(f"{value:.6g}") for value in np.percentile(foreground, PERCENTILES))
    if not low < high:
        raise ValueError(
            f"--modality is ct, but the labelled voxels have the intensity {low} everywhere, accepted here is mr"
        )
    clipped = foreground.clip(low, high)
    mean, deviation = (float(f"{value:.6g}") for value in (clipped.mean(), clipped.std()))
    return Preprocessing(ORIENTATION, spacing, "fixed", (low, high), mean, deviation)


def _other_side(name: str) -> str:
    """left kidney -> right kidney, kidney_r -> kidney_l"""
    return SIDE.sub(lambda side: OTHER_SIDE[side.group()], name)
