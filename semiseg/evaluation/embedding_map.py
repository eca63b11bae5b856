"""A map of voxel embeddings and prototypes in the plane (MPER Fig. 5)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from torch import Tensor
from torch.nn import functional

from semiseg.config import Config
from semiseg.data import Case
from semiseg.data.augmentation import resize
from semiseg.engine.precision import autocast
from semiseg.evaluation.figures import COLOURS, MARKERS, broken, class_colours, save_figure
from semiseg.methods import Method

BACKGROUND = "#8C8C8C"
NO_CLASS = 255  # of voxels that the image does not hold
PERPLEXITY = 30.0
ITERATIONS = 500  # twice as many lower the divergence by 4 % (1500 points in six clusters)
SEED = 0


def sample_embeddings(
    method: Method,  # its network in eval mode
    case: Case,
    config: Config,
    device: torch.device,
    count: int,  # voxels of each class, at most
    generator: np.random.Generator,
) -> tuple[np.ndarray, np.ndarray]:  # [N, d] float32, [N] uint8
    """Embeddings and true classes of random voxels, class by class from one window around a random one of them."""
    embeddings, labels = [], []
    for label in np.unique(case.label):
        image, truth = _window(case, int(label), config, generator)
        with torch.no_grad(), autocast(config, device):
            _, embedding = method.network(torch.from_numpy(image)[None].to(device))
        voxels = np.flatnonzero(truth == label)
        chosen = generator.permutation(voxels)[:count]
        embeddings.append(embedding[0].flatten(1)[:, torch.from_numpy(chosen)].float().cpu().numpy().T)
        labels.append(np.full(len(chosen), label, np.uint8))
    return np.concatenate(embeddings), np.concatenate(labels)


def _window(
    case: Case, label: int, config: Config, generator: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:  # [M, *P] float32, [*P] uint8
    """What the network sees around a random voxel of a class."""
    patch_size = config.training.patch_size
    voxels = np.flatnonzero(case.label == label)
    centre = np.unravel_index(voxels[generator.integers(len(voxels))], case.label.shape)
    image, truth = case.image, case.label
    if len(patch_size) == 2:
        image, truth, centre = image[:, centre[0]], truth[centre[0]], centre[1:]
        if config.evaluation.stride is None:
            window, (resized,) = (resize(torch.from_numpy(array), patch_size) for array in (image, truth[np.newaxis]))
            return window.numpy(), resized.numpy()
    box, padding = [], []
    for side, patch, position in zip(truth.shape, patch_size, centre, strict=True):
        missing = max(patch - side, 0)
        first = int(np.clip(position + missing // 2 - patch // 2, 0, side + missing - patch))
        box.append(slice(first, first + patch))
        padding.append((missing // 2, missing - missing // 2))
    padded = np.pad(truth, padding, constant_values=NO_CLASS)
    return np.pad(image, [(0, 0), *padding])[(slice(None), *box)], padded[tuple(box)]


def embedding_map(
    embeddings: np.ndarray,  # [N, d] float32
    labels: np.ndarray,  # [N] uint8
    prototypes: Tensor | None,  # [C, K, d], of a method that has them
    class_names: Sequence[str],  # the background first
    picture: Path,  # .png
) -> None:
    """Draw the t-SNE of embeddings and prototypes, all at unit length, so that distances are those of cosines."""
    count, width = embeddings.shape
    points = torch.from_numpy(embeddings)
    if prototypes is not None:
        points = torch.cat([points, prototypes.float().cpu().reshape(-1, width)])
    plane = _t_sne(functional.normalize(points, dim=1).numpy())
    voxels, centres = plane[:count], plane[count:].reshape(len(class_names), -1, 2)

    figure = Figure(figsize=(8.5, 6), layout="constrained")
    axis = figure.subplots()
    colours = [BACKGROUND, *class_colours(len(class_names) - 1)]
    handles = []
    for label, (name, colour) in enumerate(zip(class_names, colours, strict=True)):
        marker = MARKERS[max(label - 1, 0) // len(COLOURS) % len(MARKERS)]
        across, up = voxels[labels == label].T
        axis.scatter(across, up, s=9, c=colour, marker=marker, alpha=0.55, linewidths=0)
        across, up = centres[label].T
        axis.scatter(across, up, s=260, c=colour, marker="*", edgecolors="black", linewidths=1.2, zorder=3)
        handles.append(Line2D([], [], color=colour, marker=marker, linestyle="none", label=broken(name, 2.5)))
    if prototypes is not None:
        star = Line2D([], [], linestyle="none", marker="*", markersize=14, color="white", markeredgecolor="black")
        star.set_label("prototype")
        handles.append(star)
    figure.legend(handles=handles, loc="outside right upper", frameon=False)
    axis.set_aspect("equal", adjustable="datalim")
    axis.set_xticks([])
    axis.set_yticks([])
    axis.set_title(f"t-SNE of {count} voxels' embeddings")
    save_figure(figure, picture)


def _t_sne(
    points: np.ndarray,  # [N, d] float32
) -> np.ndarray:  # [N, 2]
    from sklearn.manifold import TSNE  # takes a second to import

    # Not started from principal components: those of embeddings that have collapsed do not exist.
    perplexity = min(PERPLEXITY, (len(points) - 1) / 3)
    t_sne = TSNE(perplexity=perplexity, init="random", max_iter=ITERATIONS, random_state=SEED)
    return t_sne.fit_transform(points)
