"""Pictures of a run: learning curves, and predictions over the images."""

import json
import textwrap
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import ceil
from pathlib import Path
from typing import IO, Any

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.text import Text
from nibabel.orientations import apply_orientation, axcodes2ornt, ornt_transform
from scipy.ndimage import gaussian_filter1d

from semiseg.atomic import replace_atomically
from semiseg.data import Case
from semiseg.evaluation.metrics import CaseMetrics

COLOURS = ("#E69F00", "#56B4E9", "#009E73", "#CC79A7", "#F0E442", "#0072B2", "#D55E00")  # Okabe and Ito's
MARKERS = "osD^v"  # another for every seven classes, as the colours repeat
RATES = ("learning_rate", "ramp_up")
VALIDATION = "validation_dice"
SMOOTHING = 0.02  # of a stage's length, the standard deviation of the Gaussian that smooths a loss
MAX_POINTS = 2000  # drawn per line
SLICES = 3  # of a stack shown, at most; for a volume, the planes through the truth's centre
STACK_RATIO = 3.0  # a volume whose first axis is so many times coarser or shorter than the others is a stack
MARGIN = 0.15  # around the structures shown, of their extent
CHARACTER = 0.085  # inches, of a text of medium size
LARGE = 1.2  # times as wide is one of a title
LEGEND_LINE = 0.2  # inches
RADIOLOGICAL = "SPL"  # axes of a volume whose planes, superior turned up, are as radiologists look at them
PLANES = ("axial", "coronal", "sagittal")  # across these axes
FILL = 0.22  # opacity of a prediction


def learning_curves(
    metrics: Path,  # metrics.jsonl: one object a line, with iteration, stage and scalars
    picture: Path,  # .png
) -> None:
    """Draw losses (also smoothed), rates and validation Dice over the iterations, stages set apart.

    ValueError where there is no iteration yet, or the file is damaged.
    """
    try:
        records = [json.loads(line) for line in metrics.read_text().splitlines()]
    except ValueError as error:
        raise ValueError(f"{metrics} is damaged: {error}") from None
    if not records:
        raise ValueError(f"{metrics} holds no iteration")
    scalars = sorted({key for record in records for key in record} - {"iteration", "stage"})
    losses = [key for key in scalars if key not in (*RATES, VALIDATION)]
    panels = [("loss", losses)] + [
        (key.replace("_", " "), [key]) for key in (*RATES, VALIDATION) if key in scalars
    ]
    panels = [panel for panel in panels if panel[1]]

    figure = Figure(figsize=(9, 2.2 + 1.5 * len(panels)), layout="constrained")
    heights = [2.5 if name == "loss" else 1 for name, _ in panels]
    axes = figure.subplots(len(panels), sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    stages = _stages(records)
    for axis, (name, keys) in zip(axes, panels, strict=True):
        for colour, key in zip(class_colours(len(keys)), keys, strict=True):
            for stage in stages:
                _draw_scalar(axis, [record for record in stage if key in record], key, colour, name == "loss")
        for stage in stages[1:]:
            axis.axvline(stage[0]["iteration"], color="0.6", linewidth=0.8, linestyle="--")
        axis.set_ylabel(name)
        axis.grid(alpha=0.25)
    if len(losses) > 1:
        handles = [
            Line2D([], [], color=colour, label=key.replace("_", " "))
            for colour, key in zip(class_colours(len(losses)), losses, strict=True)
        ]
        axes[0].legend(handles=handles, loc="best", framealpha=0.9)
    for stage in stages:
        middle = (stage[0]["iteration"] + stage[-1]["iteration"]) / 2
        axes[0].annotate(
            stage[0]["stage"], (middle, 1.02), xycoords=("data", "axes fraction"), ha="center", va="bottom"
        )
    axes[-1].set_xlabel("iteration")
    save_figure(figure, picture)


def _stages(records: Sequence[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """The records of each stage, in the order they came."""
    stages: dict[str, list[dict[str, Any]]] = {}
    for record in records:
        stages.setdefault(record["stage"], []).append(record)
    return list(stages.values())


def _draw_scalar(axis: Axes, records: Sequence[dict[str, Any]], key: str, colour: str, smooth: bool) -> None:
    if not records:
        return
    iterations = np.array([record["iteration"] for record in records])
    values = np.array([record[key] for record in records])
    step = -(-len(values) // MAX_POINTS)
    if not smooth:
        marker = "o" if len(values) < 50 else None
        axis.plot(iterations[::step], values[::step], color=colour, marker=marker, markersize=3)
        return
    axis.plot(iterations[::step], values[::step], color=colour, alpha=0.25, linewidth=0.8)
    axis.plot(
        iterations[::step], _smoothed(values, SMOOTHING * len(values))[::step], color=colour, linewidth=1.6
    )


def _smoothed(values: np.ndarray, deviation: float) -> np.ndarray:
    """Gaussian average whose weights are renormalised at the ends, so that it does not bend there."""
    weights = gaussian_filter1d(np.ones(len(values)), deviation, mode="constant")
    return gaussian_filter1d(values, deviation, mode="constant") / weights


def overlay(
    case: Case,
    prediction: np.ndarray,  # [*S] integer
    metrics: CaseMetrics,
    picture: Path,  # .png
    title: str,
    class_names: Sequence[str],  # the background first
    orientation: str | None = None,  # of a volume: where its axes lead, e.g. LPS
) -> None:
    """Draw truth (solid line) and prediction (filled, dashed line) over planes of the image's first channel.

    A volume is shown in its three planes through the centre of the truth, a stack of slices in up to three
    spread over the truth, a 2D image as it is; each cropped to the structures. With an orientation the planes are
    as radiologists look at them: the patient's right on the left, anterior and superior above. The legend says
    every class's Dice.
    """
    case, prediction = turned(case, prediction, orientation, RADIOLOGICAL)
    planes = _planes(case, orientation is not None)
    width = max(4.2 * len(planes), 7.5)  # inches
    labels = [f"{name}, Dice {metrics[name]['dice']:.3f}" for name in class_names[1:]]
    columns = max(1, int(width / (0.75 + CHARACTER * max(map(len, labels)))))
    labels = [broken(label, width - 0.75) for label in labels]
    lines = 2 + sum(label.count("\n") + 1 for label in labels)
    figure = Figure(figsize=(width, 5 + LEGEND_LINE * ceil(lines / columns)), layout="constrained")
    axes = figure.subplots(1, len(planes), squeeze=False)[0]
    colours = class_colours(len(labels))
    for axis, (name, plane, aspect) in zip(axes, planes, strict=True):
        _draw_plane(axis, case.image[0][plane], case.label[plane], prediction[plane], colours, aspect)
        axis.set_title(name, fontsize="medium")
    handles: list[Artist] = [
        Patch(color=colour, label=label) for colour, label in zip(colours, labels, strict=True)
    ]
    handles += [
        Line2D([], [], color="0.3", linewidth=1.8, label="truth"),
        Line2D([], [], color="0.3", linewidth=1.2, linestyle="--", label="prediction"),
    ]
    figure.suptitle(broken(title, width / LARGE))
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, frameon=False)
    save_figure(figure, picture)


def turned(
    case: Case,
    prediction: np.ndarray,  # [*S]
    orientation: str | None,  # where the axes lead
    wanted: str,  # where they are to lead
) -> tuple[Case, np.ndarray]:
    """A volume and its prediction with other axes; as they are without an orientation."""
    if orientation is None:
        return case, prediction
    turn = ornt_transform(axcodes2ornt(orientation), axcodes2ornt(wanted))
    # Behind the axes that are turned there may be others.
    image = np.moveaxis(apply_orientation(np.moveaxis(case.image, 0, -1), turn), -1, 0)
    label, prediction = (apply_orientation(array, turn) for array in (case.label, prediction))
    spacing = case.spacing
    if spacing is not None:
        spacing = tuple(spacing[axis] for axis in np.argsort(turn[:, 0]))
    return replace(case, image=image, label=label, spacing=spacing), prediction


def broken(text: str, width: float) -> str:
    """A text in lines of some inches."""
    return textwrap.fill(text, max(8, int(width / CHARACTER)))


def _planes(case: Case, radiological: bool = False) -> list[tuple[str, tuple[int | slice, ...], float]]:
    """Name, index and aspect (height of a pixel over its width) of the planes to show."""
    spacing = np.ones(case.label.ndim) if case.spacing is None else np.asarray(case.spacing)
    whole = slice(None)
    if case.label.ndim == 2:
        return [("", (whole, whole), spacing[0] / spacing[1])]
    structures = np.argwhere(case.label)
    if not len(structures):
        structures = np.array([np.zeros(3, int), np.array(case.label.shape) - 1])
    if is_stack(case.label.shape, spacing):
        spread = np.linspace(structures[:, 0].min(), structures[:, 0].max(), SLICES + 2)[1:-1]
        positions = np.unique(spread.round())  # of fewer slices each once
        return [(f"slice {k:.0f}", (int(k), whole, whole), spacing[1] / spacing[2]) for k in positions]
    centre = structures.mean(axis=0).round().astype(int)
    planes = []
    for axis in (0, 1, 2) if radiological else (2, 1, 0):
        sides: list[int | slice] = [slice(None, None, -1) if radiological else whole, whole, whole]
        sides[axis] = int(centre[axis])
        rows, columns = np.delete(spacing, axis)
        name = PLANES[axis] if radiological else f"axis {axis} at {centre[axis]}"
        planes.append((name, tuple(sides), rows / columns))
    areas = [plane for plane in planes if min(case.label[plane[1]].shape) > 1]
    return areas or planes[:1]  # a line where there is nothing else


def difference_figure(
    cases: Sequence[str],
    differences: Mapping[str, np.ndarray],  # [cases] Dice in percent, of every group of seeds less the first's
) -> Figure:
    """Every case's difference, the cases in the order of the first row of differences."""
    width = max(8.0, 0.28 * len(cases) + 2)
    figure = Figure(figsize=(width, 4.5 + 0.8 * CHARACTER * max(map(len, cases))), layout="constrained")
    axis = figure.subplots()
    positions = np.arange(len(cases))
    offsets = (np.arange(len(differences)) - (len(differences) - 1) / 2) * 0.6 / len(differences)
    order = np.argsort(next(iter(differences.values())))
    axis.axhline(0, color="0.3", linewidth=1)
    for number, (name, values) in enumerate(differences.items()):
        colour = class_colours(number + 1)[-1]
        axis.vlines(positions + offsets[number], 0, values[order], color=colour, linewidth=1.2)
        marker = MARKERS[number % len(MARKERS)]
        label = broken(name, width - 0.75)
        axis.plot(positions + offsets[number], values[order], marker, color=colour, markersize=5, label=label)
    axis.set_xticks(positions, [cases[index] for index in order], rotation=90, fontsize="small")
    axis.set_xlim(-0.7, len(cases) - 0.3)
    axis.set_ylabel("difference of Dice [percentage points]")
    axis.grid(axis="y", alpha=0.25)
    figure.legend(loc="outside upper left", frameon=False)
    return figure


def is_stack(shape: Sequence[int], spacing: np.ndarray) -> bool:
    """Whether a volume [*S] of a spacing [3] is a stack of slices along its first axis."""
    return spacing[0] > STACK_RATIO * max(spacing[1:]) or STACK_RATIO * shape[0] < min(shape[1:])


def _draw_plane(
    axis: Axes,
    image: np.ndarray,  # [H, W]
    truth: np.ndarray,  # [H, W]
    prediction: np.ndarray,  # [H, W]
    colours: Sequence[str],  # of the foreground classes
    aspect: float,
) -> None:
    for side, pixels in enumerate(image.shape):
        if pixels == 1:  # a line has no contours
            image, truth, prediction = (array.repeat(2, side) for array in (image, truth, prediction))
    rows, columns = (_extent((truth > 0) | (prediction > 0), axis=a) for a in (1, 0))
    window = image[rows, columns]
    low, high = np.percentile(window, (1, 99))
    axis.imshow(window, cmap="gray", vmin=low, vmax=high, aspect=aspect, interpolation="nearest")
    for label, colour in enumerate(colours, start=1):
        predicted, true = ((array[rows, columns] == label).astype(float) for array in (prediction, truth))
        if predicted.any():
            axis.contourf(predicted, levels=[0.5, 1.5], colors=colour, alpha=FILL)
            axis.contour(predicted, levels=[0.5], colors=colour, linewidths=1.2, linestyles="--")
        if true.any():
            axis.contour(true, levels=[0.5], colors=colour, linewidths=1.8)
    axis.set_axis_off()


def _extent(structures: np.ndarray, axis: int) -> slice:
    """Rows (axis 1) or columns (axis 0) that hold structures, with a margin; all where none does."""
    present = np.flatnonzero(structures.any(axis=axis))
    if len(present) == 0:
        return slice(None)
    margin = 2 + round(MARGIN * (present[-1] - present[0]))
    return slice(max(present[0] - margin, 0), present[-1] + margin + 1)


def class_colours(count: int) -> list[str]:
    """Colours of the first foreground classes, told apart by colour-blind readers too, repeated after seven."""
    return [COLOURS[index % len(COLOURS)] for index in range(count)]


def save_figure(figure: Figure, picture: Path) -> None:
    """Write a picture; it appears whole or not at all."""
    with replace_atomically(picture) as temporary:
        draw_figure(figure, temporary)


def draw_figure(
    figure: Figure,
    target: Path | IO[bytes],  # .png
) -> None:
    """Write a picture whose texts are what they are: in names of cases and classes dollar signs make no formulas, and
    characters that the font lacks are drawn as boxes."""
    for text in figure.findobj(Text):
        text.set_parse_math(False)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        figure.savefig(target, format="png", dpi=130)
