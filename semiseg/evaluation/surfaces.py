"""The surfaces of truth and prediction in 3D, each coloured by its distance from the other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.collections import PolyCollection
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from scipy import ndimage
from scipy.spatial import KDTree
from skimage.measure import marching_cubes

from semiseg.data import Case
from semiseg.evaluation.figures import LARGE, broken, is_stack, save_figure, turned
from semiseg.evaluation.metrics import CaseMetrics
from semiseg.preparation.volume import resample

GRID = 48  # cells along each side of a mesh, at most
SMOOTHING = 0.5  # of a cell, the standard deviation of the Gaussian that takes the voxels' steps away
MAX_CLASSES = 4  # shown: those with the lowest Dice
AZIMUTHS = (-60.0, 120.0)  # degrees around the upright axis
VIEWS = ("one side", "the other side")
UPRIGHT = "SLP"  # right-handed axes, the first upright, of which the azimuths are the following views
PATIENT_VIEWS = ("the front left", "the back right")
ELEVATION = 20.0  # degrees
LIGHT = np.array([-0.4, 0.5, 0.77])  # to the right, up and towards the viewer
AMBIENT = 0.55  # brightness where no light falls: the shade must not hide the colour
COLOUR_MAP = colormaps["cividis_r"]
LIMIT = 99  # percentile of the distances where the colours end
SIDE = 2.6  # inches


@dataclass(frozen=True)
class Mesh:
    """A closed surface of triangles."""

    vertices: np.ndarray  # [V, 3] along the axes of the volume, in mm, or in voxels without a spacing
    faces: np.ndarray  # [F, 3] vertices, counterclockwise seen from outside


def surface_mesh(
    structure: np.ndarray,  # [*S] bool, three axes
    spacing: Sequence[float],  # mm along each axis
) -> Mesh | None:
    """The smoothed surface of a structure, or None where it has no voxel.

    Details finer than a 48th of its sides are lost.
    """
    found = ndimage.find_objects(structure.astype(np.uint8))
    if not found:
        return None
    box = found[0]
    sizes = np.array([side.stop - side.start for side in box])
    cells = np.maximum(spacing, sizes * spacing / GRID)  # mm along each axis
    deviations = SMOOTHING * cells / spacing
    margin = 2 * np.ceil(cells / spacing + deviations).astype(int)
    padded = np.pad(structure[box].astype(np.float32), [(side, side) for side in margin])
    smooth = resample(ndimage.gaussian_filter(padded, deviations), tuple(spacing), tuple(cells))
    vertices, faces, _, _ = marching_cubes(smooth, min(0.5, smooth.max() / 2))
    corner = (np.array([side.start for side in box]) - margin) * spacing
    # marching_cubes gives clockwise triangles around what is brighter.
    return Mesh(corner + (vertices + 0.5) * cells, faces[:, ::-1])


def surfaces(
    case: Case,  # of a volume
    prediction: np.ndarray,  # [*S] integer
    metrics: CaseMetrics,
    picture: Path,  # .png
    title: str,
    class_names: Sequence[str],  # the background first
    orientation: str | None = None,  # where the axes lead, e.g. LPS
) -> None:
    """Draw truth and prediction of each class from two sides, coloured by the distance to the other's surface.

    With an orientation the upright axis and the sides are the patient's. Of many classes the four with the lowest Dice
    are shown. A stack of slices without a spacing is drawn about as high as it is wide, and its distances are in voxels.
    """
    case, prediction = turned(case, prediction, orientation, UPRIGHT)
    spacing = (1.0, 1.0, 1.0) if case.spacing is None else case.spacing
    unit = "voxel" if case.spacing is None else "mm"
    stack = is_stack(case.label.shape, np.asarray(spacing))
    names = sorted(
        sorted(metrics, key=lambda name: metrics[name]["dice"])[:MAX_CLASSES], key=class_names.index
    )
    pairs = []
    for name in names:
        label = class_names.index(name)
        pairs.append([surface_mesh(array == label, spacing) for array in (case.label, prediction)])
    distances = [_distances(*pair) for pair in pairs]
    known = np.concatenate([np.zeros(1), *(values for pair in distances for values in pair)])
    scale = Normalize(0, max(float(np.percentile(known, LIMIT)), min(spacing)))
    stretch = _stretch(pairs) if stack and case.spacing is None else np.ones(3)

    upright = 0 if stack or orientation is not None else 2
    rotations = [_rotation(upright, azimuth) * stretch for azimuth in AZIMUTHS]
    views = VIEWS if orientation is None else PATIENT_VIEWS
    frames = [[_frame(pair, rotation) for rotation in rotations] for pair in pairs]
    ratios = [max(np.divide(*(high - low)[::-1]) for low, high in row) for row in frames]
    heights = [SIDE * min(ratio, 1.2) + 0.4 for ratio in ratios]
    height = max(sum(heights) + 0.6, 3.2)
    figure = Figure(figsize=(SIDE * 4 + 1, height), layout="constrained")
    axes = figure.subplots(len(names), 4, squeeze=False, height_ratios=heights)
    for row, name, pair, values, seen, inches in zip(axes, names, pairs, distances, frames, heights, strict=True):
        for column, axis in enumerate(row):
            view, which = divmod(column, 2)
            axis.set(xticks=[], yticks=[])
            axis.set_aspect("equal", adjustable="datalim")
            axis.update_datalim(seen[view])
            axis.autoscale_view()
            axis.spines[:].set_visible(False)
            _draw_mesh(axis, pair[which], values[which], scale, rotations[view])
        row[0].set_ylabel(f"{broken(name, inches)}\nDice {metrics[name]['dice']:.3f}")
    for column, axis in enumerate(axes[0]):
        axis.set_title(
            f"{('truth', 'prediction')[column % 2]}, from {views[column // 2]}", fontsize="medium"
        )
    bar = figure.colorbar(
        ScalarMappable(scale, COLOUR_MAP), ax=axes, extend="max", aspect=20, shrink=3 / height
    )
    bar.set_label(f"distance to the\nother surface [{unit}]")
    figure.suptitle(broken(title, figure.get_figwidth() / LARGE))
    save_figure(figure, picture)


def _distances(truth: Mesh | None, prediction: Mesh | None) -> tuple[np.ndarray, np.ndarray]:
    """Of every vertex to the nearest one of the other mesh; nothing where one of the two is missing."""
    if truth is None or prediction is None:
        return np.empty(0), np.empty(0)
    to_prediction, _ = KDTree(prediction.vertices).query(truth.vertices)
    to_truth, _ = KDTree(truth.vertices).query(prediction.vertices)
    return to_prediction, to_truth


def _stretch(pairs: Sequence[Sequence[Mesh | None]]) -> np.ndarray:
    """Factors of the three axes that make the truth as high as it is wide."""
    vertices = [truth.vertices for truth, _ in pairs if truth is not None]
    if not vertices:
        return np.ones(3)
    height, *sides = np.ptp(np.concatenate(vertices), axis=0)
    return np.array([max(sides) / height, 1.0, 1.0])


def _rotation(
    upright: int,  # the axis of the volume that leads up
    azimuth: float,  # degrees, of the viewer around it
) -> np.ndarray:  # [3, 3] from the volume's axes to right, up and towards the viewer
    turn, lift = np.radians(azimuth), np.radians(ELEVATION)
    viewer = np.array([np.cos(lift) * np.cos(turn), np.cos(lift) * np.sin(turn), np.sin(lift)])
    right = np.array([-np.sin(turn), np.cos(turn), 0.0])
    # The columns are for the axes in cyclic order, the upright one last.
    return np.roll(np.stack([right, np.cross(viewer, right), viewer]), upright - 2, axis=1)


def _frame(pair: Sequence[Mesh | None], rotation: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Lower left and upper right corner of what shows both meshes."""
    vertices = [mesh.vertices for mesh in pair if mesh is not None]
    if not vertices:
        return np.zeros(2), np.ones(2)
    seen = np.concatenate(vertices) @ rotation[:2].T
    return seen.min(axis=0), seen.max(axis=0)


def _draw_mesh(
    axis: Axes,
    mesh: Mesh | None,
    distances: np.ndarray,  # [V], or nothing
    scale: Normalize,
    rotation: np.ndarray,  # [3, 3]
) -> None:
    if mesh is None:
        axis.text(0.5, 0.5, "no voxel", ha="center", va="center", transform=axis.transAxes)
        return
    corners = (mesh.vertices @ rotation.T)[mesh.faces]  # [F, 3, 3]
    normals = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    normals /= np.maximum(np.linalg.norm(normals, axis=1, keepdims=True), np.finfo(float).tiny)
    front = np.flatnonzero(normals[:, 2] > 0)
    front = front[np.argsort(corners[front].mean(axis=1)[:, 2])]  # the nearest is drawn last
    brightness = AMBIENT + (1 - AMBIENT) * np.clip(normals[front] @ (LIGHT / np.linalg.norm(LIGHT)), 0, 1)
    colours = np.full((len(front), 3), 0.75)  # grey where there is nothing to be distant from
    if len(distances):
        colours = COLOUR_MAP(scale(distances[mesh.faces[front]].mean(axis=1)))[:, :3]
    triangles = PolyCollection(corners[front, :, :2], linewidths=0.3)
    triangles.set_facecolor(colours * brightness[:, None])
    triangles.set_edgecolor("face")
    axis.add_collection(triangles, autolim=False)
