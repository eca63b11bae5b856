"""Meshes enclose what they should, and pictures show distances."""

import matplotlib.image
import numpy as np
import pytest

from semiseg.data import Case
from semiseg.evaluation import surfaces as module
from semiseg.evaluation.metrics import case_metrics
from semiseg.evaluation.surfaces import surface_mesh, surfaces

NAMES = ("background", "ball", "block")


def ball(shape, radius: float, spacing=(1.0, 1.0, 1.0)) -> np.ndarray:
    """Voxels within a radius in mm around the middle."""
    middle = np.reshape(shape, (3, 1, 1, 1)) / 2 - 0.5
    offsets = (np.indices(shape) - middle) * np.reshape(spacing, (3, 1, 1, 1))
    return (offsets**2).sum(axis=0) < radius**2


def enclosed_volume(mesh) -> float:
    """By the divergence theorem; positive if the triangles are counterclockwise seen from outside."""
    a, b, c = np.moveaxis(mesh.vertices[mesh.faces], 1, 0)
    return float(np.einsum("fi,fi->", a, np.cross(b, c)) / 6)


@pytest.mark.parametrize(
    ("shape", "radius", "spacing"),
    [
        ((40, 40, 40), 15.0, (1.0, 1.0, 1.0)),
        ((20, 60, 60), 15.0, (2.0, 0.6, 0.6)),
        ((150, 150, 30), 35.0, (0.5, 0.5, 2.6)),  # coarser than its voxels
    ],
)
def test_the_mesh_of_a_ball(shape, radius, spacing):
    mesh = surface_mesh(ball(shape, radius, spacing), spacing)
    assert enclosed_volume(mesh) == pytest.approx(4 / 3 * np.pi * radius**3, rel=0.06)
    # The first corner of the volume is the origin, so its middle is half of its extent.
    middle = np.multiply(shape, spacing) / 2
    np.testing.assert_allclose(np.ptp(mesh.vertices, axis=0), 2 * radius, atol=1.5 * max(spacing))
    np.testing.assert_allclose((mesh.vertices.max(axis=0) + mesh.vertices.min(axis=0)) / 2, middle, atol=1)
    edges = np.sort(
        np.concatenate([mesh.faces[:, [0, 1]], mesh.faces[:, [1, 2]], mesh.faces[:, [2, 0]]]), axis=1
    )
    assert (np.unique(edges, axis=0, return_counts=True)[1] == 2).all()  # closed
    assert len(mesh.faces) < 40_000


def test_the_mesh_of_what_touches_the_border_of_the_volume_is_closed():
    mesh = surface_mesh(np.ones((6, 7, 8), bool), (1.0, 1.0, 1.0))
    assert enclosed_volume(mesh) == pytest.approx(6 * 7 * 8, rel=0.12)  # corners are rounded


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 9, 9), (1, 1, 9)])
def test_thin_structures_have_a_mesh(shape):
    structure = np.zeros((12, 12, 12), bool)
    structure[tuple(slice(1, 1 + side) for side in shape)] = True
    assert enclosed_volume(surface_mesh(structure, (1.0, 1.0, 3.0))) > 0


def test_nothing_has_no_mesh():
    assert surface_mesh(np.zeros((4, 4, 4), bool), (1.0, 1.0, 1.0)) is None


def picture_of(
    tmp_path, monkeypatch, label, prediction, spacing=None, names=NAMES, orientation=None
) -> tuple[np.ndarray, list]:
    """Pixels of the picture and the distances drawn in it."""
    drawn = []
    draw = module._draw_mesh

    def noting(axis, mesh, distances, scale, rotation):
        drawn.append((mesh, distances))
        draw(axis, mesh, distances, scale, rotation)

    monkeypatch.setattr(module, "_draw_mesh", noting)
    case = Case("case", np.zeros((1, *label.shape), np.float32), label, spacing)
    metrics = case_metrics(prediction, label, names, spacing)
    surfaces(case, prediction, metrics, tmp_path / "surfaces.png", "title", names, orientation)
    return matplotlib.image.imread(tmp_path / "surfaces.png")[..., :3], drawn


def test_distances_are_those_of_the_surfaces(tmp_path, monkeypatch):
    spacing = (0.5, 1.0, 1.0)
    truth = np.zeros((60, 30, 30), np.uint8)
    truth[10:30, 8:20, 8:20] = 2
    prediction = np.roll(truth, 8, axis=0)  # by 4 mm along an axis of 10 mm
    pixels, drawn = picture_of(
        tmp_path, monkeypatch, truth, prediction, spacing, ("background", "none", "block")
    )
    none, block = drawn[:4], drawn[4:]
    assert all(mesh is None for mesh, _ in none)
    for _, distances in block:
        assert distances.max() == pytest.approx(4, abs=0.3)  # at the two ends
        assert distances.min() < 0.3  # along the sides
    saturation = pixels.max(axis=2) - pixels.min(axis=2)
    assert ((saturation > 0.3).mean() > 0.02) and min(pixels.shape[:2]) > 300


def test_equal_surfaces_have_no_distance(tmp_path, monkeypatch):
    label = ball((20, 20, 20), 6).astype(np.uint8)
    _, drawn = picture_of(tmp_path, monkeypatch, label, label, (1.0, 1.0, 1.0), NAMES[:2])
    assert len(drawn) == 4 and all((distances == 0).all() for _, distances in drawn)


def test_a_patient_looks_the_same_however_the_axes_lie(tmp_path, monkeypatch):
    label = np.zeros((20, 24, 16), np.uint8)  # to the left, to the posterior, to the superior
    label[4:16, 4:10, 4:12] = 1
    label[4:8, 4:20, 4:6] = 1  # other than its mirror image
    prediction = np.roll(label, 2, axis=1)
    spacing = (1.0, 2.0, 1.5)
    expected, _ = picture_of(tmp_path, monkeypatch, label, prediction, spacing, NAMES[:2], "LPS")
    for orientation, axes in (("RAS", (0, 1, 2)), ("SPL", (2, 1, 0))):
        flips = [axis for axis, code in enumerate(orientation) if code in "RAI"]
        turned = [np.flip(array.transpose(axes), flips) for array in (label, prediction)]
        size = tuple(spacing[axis] for axis in axes)
        pixels, _ = picture_of(tmp_path, monkeypatch, *turned, size, NAMES[:2], orientation)
        assert np.array_equal(pixels, expected), orientation
    unknown, _ = picture_of(tmp_path, monkeypatch, label, prediction, spacing, NAMES[:2])
    below_headings = np.abs(unknown - expected)[100:]
    assert below_headings.mean() < 0.01  # where nothing is known, the third of right-handed axes is upright


@pytest.mark.parametrize("empty", ["prediction", "truth", "both"])
def test_a_class_without_a_voxel(tmp_path, monkeypatch, empty):
    label = ball((9, 40, 40), 8).astype(np.uint8)
    truth = label if empty == "prediction" else np.zeros_like(label)
    prediction = label if empty == "truth" else np.zeros_like(label)
    pixels, drawn = picture_of(tmp_path, monkeypatch, truth, prediction, names=NAMES[:2])
    assert [mesh is None for mesh, _ in drawn[:2]] == [empty != "prediction", empty != "truth"]
    assert all(len(distances) == 0 for _, distances in drawn)
    assert pixels.std() > 0.05


def test_of_many_classes_the_worst_are_shown(tmp_path, monkeypatch):
    names = ("background", *"abcdef")
    label = np.zeros((14, 14, 14), np.uint8)
    for number in range(1, 7):
        label[2 * number - 1 : 2 * number + 1, 2:8, 2:8] = number
    prediction = label.copy()
    for number in (2, 3, 5, 6):
        prediction[label == number] = 0
        prediction[2 * number, 2:8, 2:8] = number
    _, drawn = picture_of(tmp_path, monkeypatch, label, prediction, names=names)
    lowest = [mesh.vertices[:, 0].min() for mesh, _ in drawn[::4]]
    assert len(drawn) == 16 and lowest == sorted(lowest)
    assert [round(value) for value in lowest] == [2 * number - 1 for number in (2, 3, 5, 6)]
