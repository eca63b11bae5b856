"""Embeddings are those of the voxels they are said to be of; similar ones lie together on the map."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from semiseg.config import load_config
from semiseg.data import Case
from semiseg.evaluation import embedding_map as module
from semiseg.evaluation.embedding_map import embedding_map, sample_embeddings

NAMES = ("background", "a", "b")
CPU = torch.device("cpu")


class Identity:
    """A network whose embedding holds the image's values and the voxels of its input."""

    def __init__(self, dimensions: int):
        self.dimensions = dimensions

    def __call__(self, image):
        assert image.ndim == self.dimensions + 2 and not torch.is_grad_enabled()
        return image, torch.cat([image, torch.full_like(image[:, :1], image[0, 0].numel())], dim=1)


VOLUMES = ["training.patch_size=[32, 32, 16]"]


@pytest.mark.parametrize(
    ("config", "overrides", "shape"),
    [
        ("phantom_supervised", VOLUMES, (50, 40, 30)),
        ("phantom_supervised", VOLUMES, (20, 40, 9)),  # smaller than the patch
        ("acdc_supervised", ["training.patch_size=[48, 32]"], (3, 24, 60)),  # resized
        (
            "acdc_supervised",
            ["training.patch_size=[48, 32]", "evaluation.stride=[9, 9]"],
            (3, 24, 60),
        ),
    ],
)
def test_samples_are_of_their_class(config, overrides, shape):
    config = load_config(config, overrides)
    label = np.zeros(shape, np.uint8)
    label[:, : shape[1] // 2] = 1
    label[:, -3:, -2:] = 2
    values = label.astype(np.float32) + 1
    method = SimpleNamespace(network=Identity(len(config.training.patch_size)))
    case = Case("case", np.stack([values, -values]), label, None)
    embeddings, labels = sample_embeddings(method, case, config, CPU, 12, np.random.default_rng(0))
    counts = np.bincount(labels, minlength=3)
    assert counts[0] == counts[1] == 12 and 0 < counts[2] <= 12
    assert (embeddings[:, 2] == np.prod(config.training.patch_size)).all()
    assert (embeddings[:, 1] == -embeddings[:, 0]).all()
    # The image is resized linearly, so near the border of a class it is a mixture.
    tolerance = 0.6 if config.evaluation.stride is None else 0
    assert (np.abs(embeddings[:, 0] - labels - 1) <= tolerance).all()


def test_a_voxel_is_drawn_once():
    config = load_config("phantom_supervised", VOLUMES)
    image = np.arange(32 * 32 * 16, dtype=np.float32).reshape(1, 32, 32, 16)
    case = Case("case", image, np.zeros(image.shape[1:], np.uint8), None)
    method = SimpleNamespace(network=Identity(3))
    embeddings, _ = sample_embeddings(method, case, config, CPU, 5000, np.random.default_rng(0))
    assert len(np.unique(embeddings[:, 0])) == 5000


def map_of(tmp_path, monkeypatch, embeddings, labels, prototypes) -> np.ndarray:
    """Where the map places embeddings and prototypes."""
    planes = []
    t_sne = module._t_sne

    def noting(points):
        planes.append(t_sne(points))
        return planes[-1]

    monkeypatch.setattr(module, "_t_sne", noting)
    embedding_map(embeddings, labels, prototypes, NAMES, tmp_path / "map.png")
    assert (tmp_path / "map.png").read_bytes().startswith(b"\x89PNG")
    return planes[0]


def test_directions_that_differ_lie_apart_and_prototypes_among_their_class(tmp_path, monkeypatch):
    random = np.random.default_rng(3)
    centres = np.eye(3, 8, dtype=np.float32)
    labels = np.repeat(np.arange(3, dtype=np.uint8), 40)
    lengths = random.uniform(0.5, 5, (120, 1))  # which the map does not show
    embeddings = ((centres[labels] + random.normal(0, 0.05, (120, 8))) * lengths).astype(np.float32)
    prototypes = torch.from_numpy(np.stack([centres, centres], axis=1))  # [3, 2, 8]
    plane = map_of(tmp_path, monkeypatch, embeddings, labels, prototypes)
    assert plane.shape == (126, 2)
    middles = np.stack([plane[:120][labels == label].mean(axis=0) for label in range(3)])
    nearest = np.linalg.norm(plane[:, None] - middles, axis=2).argmin(axis=1)
    np.testing.assert_array_equal(nearest, np.concatenate([labels, [0, 0, 1, 1, 2, 2]]))
    again = map_of(tmp_path, monkeypatch, embeddings, labels, prototypes)
    np.testing.assert_array_equal(plane, again)


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_embeddings_that_have_collapsed(tmp_path, monkeypatch, value):
    labels = np.repeat(np.arange(3, dtype=np.uint8), 5)
    plane = map_of(tmp_path, monkeypatch, np.full((15, 4), value, np.float32), labels, None)
    assert np.isfinite(plane).all()
