"""The first prototypes: mini-batch k-means over the embeddings of the labelled images, class by class."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from semiseg.data import Case, resize
from semiseg.evaluation.sliding_window import volume_slabs
from semiseg.models.vnet import SIDE_MULTIPLE

BATCHES_KEPT = 64  # of a class's voxels, which are many more than clustering takes
DUPLICATE_NOISE = 1e-2  # of the embedding's size, for a class with fewer voxels than prototypes


def cluster_embeddings(
    network: nn.Module,
    labelled: Sequence[Case],
    num_classes: int,
    num_prototypes: int,
    patch_size: tuple[int, ...],
    batch: int,
    seed: int,
) -> Tensor:  # [C, K, d] float32
    """Cluster the embeddings of the labelled voxels into K centres a class (MiniBatchKMeans, MPER §II-A).

    The network runs in eval mode, the embeddings of a patch's depth are in memory at a time, and of every class a
    random sample of 64 mini-batches of `batch` voxels, or all its voxels if fewer. Warns where a class has fewer
    voxels than prototypes and duplicates them with a little noise; raises ValueError where a class has none,
    FloatingPointError where embeddings are NaN or infinite, as a training that diverges makes them.
    """
    clusterings = [_ClassClustering(num_prototypes, batch, seed) for _ in range(num_classes)]
    training = network.training
    network.eval()
    for embedding, label in _embeddings(network, labelled, patch_size):
        if not np.isfinite(embedding).all():
            raise FloatingPointError("the embeddings of the labelled images hold NaN or infinity")
        for c, clustering in enumerate(clusterings):
            clustering.add(embedding[:, label == c].T)
    network.train(training)
    return torch.from_numpy(np.stack([clustering.centres(c) for c, clustering in enumerate(clusterings)]))


@torch.no_grad()
def _embeddings(network: nn.Module, labelled: Sequence[Case], patch_size: tuple[int, ...]) -> Iterator[tuple]:
    """(embedding [d, n, *S[1:]], label [n, *S[1:]]) of every case, slab by slab; slices are at training size in 2D."""
    device = next(network.parameters()).device
    for case in labelled:
        image, label = torch.from_numpy(case.image), torch.from_numpy(case.label)
        if label.ndim == 2:
            image, label = resize(image, patch_size), resize(label.unsqueeze(0), patch_size)[0]
        volume = image.contiguous().to(device)
        window = even_window(label.shape, patch_size)
        first = 0
        for slab in volume_slabs(lambda x: network(x)[1], volume, window, window, batch_size=1):
            yield slab.cpu().numpy(), label[first : first + slab.shape[1]].numpy()
            first += slab.shape[1]


def even_window(
    shape: Sequence[int],  # S
    patch_size: Sequence[int],
) -> tuple[int, ...]:
    """Sides the network takes, at most the patch's, of which the fewest cover a volume with little overlap."""
    windows = [-(-side // patch) for side, patch in zip(shape, patch_size, strict=True)]
    return tuple(
        SIDE_MULTIPLE * -(-side // (count * SIDE_MULTIPLE))
        for side, count in zip(shape, windows, strict=True)
    )


class _ClassClustering:
    """k-means of one class, fed slab by slab: of a random sample, as the slabs come in the order of space and cases."""

    def __init__(self, num_prototypes: int, batch: int, seed: int):
        self.num_prototypes = num_prototypes
        self.batch = max(batch, num_prototypes)
        self.seed, self.random = seed, np.random.default_rng(seed)
        self.sample = np.empty((0, 0), dtype=np.float32)  # [n, d], of at most BATCHES_KEPT batches
        self.seen = 0

    def add(self, voxels: np.ndarray) -> None:  # [n, d]
        """Keep every voxel seen so far with equal probability (reservoir sampling)."""
        most = BATCHES_KEPT * self.batch
        free = most - len(self.sample)
        if free:
            self.sample = np.concatenate([self.sample.reshape(-1, voxels.shape[1]), voxels[:free]])
        order = np.arange(self.seen, self.seen + len(voxels))[free:]
        place = self.random.integers(0, order + 1)
        kept = place < most
        self.sample[place[kept]] = voxels[free:][kept]
        self.seen += len(voxels)

    def centres(self, class_index: int) -> np.ndarray:  # [K, d]
        from sklearn.cluster import MiniBatchKMeans  # more than a second, of no use to most commands

        voxels, clusters = self.random.permutation(self.sample), self.num_prototypes
        if not len(voxels):
            raise ValueError(
                f"the labelled images hold no voxel of class {class_index}, so it can have no prototype"
            )
        if len(voxels) < clusters:
            warnings.warn(
                f"class {class_index} has {len(voxels)} labelled voxels for {clusters} prototypes: duplicated with "
                "noise",
                stacklevel=2,
            )
            copies = voxels[np.arange(clusters) % len(voxels)]
            noise = self.random.standard_normal(copies.shape).astype(np.float32)
            return copies + DUPLICATE_NOISE * np.abs(copies).mean() * noise
        kmeans = MiniBatchKMeans(clusters, random_state=self.seed)
        for start in range(0, len(voxels), self.batch):
            part = voxels[start : start + self.batch]
            if len(part) >= clusters:
                kmeans.partial_fit(part)
        return kmeans.cluster_centers_.astype(np.float32)
