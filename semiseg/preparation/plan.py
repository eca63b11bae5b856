"""Spacing, intensities, patch and configurations that follow from what is in a dataset."""

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from nibabel.orientations import axcodes2ornt

from semiseg.data.preprocessing import BRIGHTEST, EIGHT_BITS, Intensity, Preprocessing
from semiseg.models.vnet import SIDE_MULTIPLE
from semiseg.preparation.survey import ORIENTATION, PICTURE, Facts
from semiseg.preparation.volume import slice_orientation

PATCH_VOXELS = {2: 256**2, 3: 96**3}  # at most, by dimensions
PERCENTILES = (0.5, 99.5)  # of the labelled voxels of a CT: what lies outside is cut off
SAME_SIDES = 1.2  # spacings of two axes whose ratio is below may be exchanged by a rotation
OTHER_SIDE = {"left": "right", "l": "r", "lt": "rt"}  # of the body
OTHER_SIDE |= {right: left for left, right in OTHER_SIDE.items()}
# In a name of small letters; what is short counts only where it stands alone.
SIDE = re.compile("left|right|(?<![a-z0-9])(?:l|r|lt|rt)(?![a-z0-9])")
VALIDATION_INTERVAL = 200  # iterations, as with ACDC
NETWORKS = {
    2: {"name": "unet", "filters": [16, 32, 64, 128, 256], "dropout": [0.05, 0.1, 0.2, 0.3, 0.5]},
    3: {"name": "vnet", "filters": [16], "dropout": [0.5]},
}
BATCHES = {  # labelled, and unlabelled, images of a step
    2: {"supervised": 12, "mper": 12, "vclipseg": 12},
    3: {"supervised": 4, "mper": 4, "vclipseg": 2},
}
# Those of the papers on ACDC and on the left atrium, but that learning rates are cut, or less often. VCLIPSeg's is on
# volumes alone.
SCHEDULES: Mapping[int, Mapping[str, Mapping[str, float]]] = {
    2: {
        "supervised": {"iterations": 40000, "learning_rate_step": 32000},
        "mper": {
            "pretraining_iterations": 10000,
            "iterations": 30000,
            "contrast_weight": 0.1,
            "ramp_up_iterations": 30000,
            "learning_rate_step": 24000,
        },
        "vclipseg": {"iterations": 30000, "ramp_up_iterations": 12000, "learning_rate_step": 24000},
    },
    3: {
        "supervised": {"iterations": 17000, "learning_rate_step": 6000},
        "mper": {
            "pretraining_iterations": 2000,
            "iterations": 15000,
            "contrast_weight": 0.02,
            "ramp_up_iterations": 6000,
            "learning_rate_step": 6000,
        },
        "vclipseg": {"iterations": 15000, "ramp_up_iterations": 6000},
    },
}


@dataclass(frozen=True)
class Plan:
    """How a dataset is brought to one form and trained on."""

    preprocessing: Preprocessing
    patch: tuple[int, ...]  # voxels
    augmentation: str
    is_resized: bool = False  # pictures, to the patch

    @property
    def dimensions(self) -> int:
        """2 if trained slice by slice."""
        return len(self.patch)


def plan(
    facts: Sequence[Facts],  # of all scans that are kept
    labelled: Sequence[Facts],  # of those whose labels may be used
    class_names: Sequence[str],
    modalities: Sequence[str],  # one a channel
    spacing: tuple[float, ...] | None = None,  # mm, of slices down and along their rows; None: the median
    dimensions: int = 3,  # 2: slice by slice
    size: tuple[int, int] | None = None,  # rows and columns that pictures are resized to; None: like the median
) -> Plan:
    """Choose for a dataset. Raises ValueError where a CT's labelled voxels all have one intensity."""
    orientation = ORIENTATION
    if dimensions == 2:
        orientation = Counter(slice_orientation(ORIENTATION, one.spacing) for one in facts).most_common(1)[0][0]
    axes = [trained_axes(one, dimensions)[-dimensions:] for one in facts]  # that are resampled
    spacings, extents = (
        np.array([np.take(values, which) for values, which in zip(of_scans, axes, strict=True)])
        for of_scans in ([one.spacing for one in facts], [one.extent for one in facts])
    )
    if spacing is None:
        spacing = tuple(float(f"{size:.4g}") for size in np.median(spacings, axis=0))
    names = {name.lower() for name in class_names}
    has_sides = any(_other_side(name) in names - {name} for name in names)
    shape = tuple(np.median(extents / spacing, axis=0))
    if PICTURE in modalities:
        return Plan(
            Preprocessing(orientation, None, _intensities(facts, labelled, modalities)),
            size or patch_size(shape, spacing),
            "crop" if has_sides else "rotate_flip_resize",
            is_resized=True,
        )
    turned = spacing[:2]  # of the axes that a rotation exchanges
    return Plan(
        Preprocessing(orientation, array_spacing(spacing), _intensities(facts, labelled, modalities)),
        patch_size(shape, spacing),
        "crop" if has_sides or max(turned) / min(turned) > SAME_SIDES else "crop_dihedral",
    )


def array_spacing(
    spacing: tuple[float, ...],  # mm, along the axes that are resampled
) -> tuple[float | None, ...]:
    """Along every axis of a case, None from slice to slice."""
    return (*(None,) * (3 - len(spacing)), *spacing)


def trained_axes(scan: Facts, dimensions: int) -> list[int]:
    """The axes of a scan in the order in which it is trained on: of two dimensions first from slice to slice."""
    orientation = ORIENTATION if dimensions == 3 else slice_orientation(ORIENTATION, scan.spacing)
    axes: list[int] = axcodes2ornt(orientation)[:, 0].astype(int).tolist()
    return axes


def patch_size(
    shape: tuple[float, ...],  # voxels of a usual scan
    spacing: tuple[float, ...],  # mm
) -> tuple[int, ...]:
    """A patch like the scan, then smaller along its longest side in mm until it is within the budget."""
    sides = [SIDE_MULTIPLE * max(1, math.floor(side / SIDE_MULTIPLE + 0.5)) for side in shape]
    while math.prod(sides) > PATCH_VOXELS[len(sides)]:
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
    """What `python -m semiseg.train --config` takes, by method; without unlabelled cases only the baseline."""
    methods: dict[str, dict[str, Any]] = {"supervised": {}}
    if unlabelled:
        # Not the paper's rule but that of its code, by which prototypes keep to their classes.
        methods["mper"] = {"zero_box": [side * 2 // 3 for side in plan.patch], "update_requires_agreement": True}
        # Random embeddings of the class names need no download; text: clip learns from CLIP's.
        methods["vclipseg"] = {"text": "random"}
    return {
        name: _configuration(plan, root, labelled, validated, name, particular)
        for name, particular in methods.items()
    }


def _configuration(
    plan: Plan,
    root: Path,
    labelled: int,
    validated: bool,
    method: str,
    particular: Mapping[str, Any],  # keys of the method that follow from the data
) -> dict[str, Any]:
    batch = BATCHES[plan.dimensions][method]
    return {
        **({} if method == "supervised" else {"base": f"base/{method}"}),
        "name": f"{root.name}_{method}",
        "dataset": {"name": "own", "root": str(root), "labelled": labelled, "augmentation": plan.augmentation},
        "network": NETWORKS[plan.dimensions],
        "training": {"patch_size": list(plan.patch), "labelled_batch": batch, "unlabelled_batch": batch},
        "method": {"name": method, **particular, **SCHEDULES[plan.dimensions][method]},
        "evaluation": {
            "stride": None if plan.is_resized else [side // 2 for side in plan.patch],
            **({"validation_interval": VALIDATION_INTERVAL} if validated else {}),
        },
    }


def _intensities(
    facts: Sequence[Facts],  # of all scans that are kept
    labelled: Sequence[Facts],
    modalities: Sequence[str],
) -> tuple[Intensity, ...]:
    foreground = np.concatenate([one.foreground for one in labelled], axis=1)
    lowest, highest = min(min(one.lowest) for one in facts), max(max(one.highest) for one in facts)
    # TIFFs of floating point that end at 1 are scaled already: divided again they would be all but black.
    if PICTURE in modalities and lowest >= 0 and 1 < highest <= BRIGHTEST:
        return (EIGHT_BITS,) * len(modalities)
    return tuple(
        _ct_intensity(channel) if modality == "ct" else Intensity()
        for channel, modality in zip(foreground, modalities, strict=True)
    )


def _ct_intensity(
    foreground: np.ndarray,  # [n] float32
) -> Intensity:
    low, high = (float(f"{value:.6g}") for value in np.percentile(foreground, PERCENTILES))
    if not low < high:
        raise ValueError(
            f"--modality is ct, but the labelled voxels have the intensity {low} everywhere, accepted here is mr"
        )
    clipped = foreground.clip(low, high)
    mean, deviation = (float(f"{value:.6g}") for value in (clipped.mean(), clipped.std()))
    return Intensity("fixed", (low, high), mean, deviation)


def _other_side(name: str) -> str:
    """left kidney -> right kidney, kidney_r -> kidney_l"""
    return SIDE.sub(lambda side: OTHER_SIDE[side.group()], name)
