"""k-means of 8 labelled left atrium volumes under the network of `la_mper`: time and extra memory."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from memory import host_extra_peak

from semiseg.config import load_config
from semiseg.data import open_dataset
from semiseg.methods.prototype_initialisation import cluster_embeddings
from semiseg.models import build_network


def test_prototype_initialisation(benchmark: Any) -> None:
    root = os.environ.get("SEMISEG_DATA")
    if not root:
        pytest.skip("SEMISEG_DATA is not set: it names the folder that holds LA and ACDC")
    config = load_config("la_mper")
    labelled, _ = open_dataset("la", Path(root) / "LA").training_cases(8)
    torch.manual_seed(0)
    network = build_network("vnet", num_classes=2, filters=config.network.filters[0])

    def run() -> torch.Tensor:
        method, patch = config.method, config.training.patch_size
        return cluster_embeddings(network, labelled, 2, method.num_prototypes, patch, method.kmeans_batch, seed=0)

    peak, prototypes = benchmark.pedantic(lambda: host_extra_peak(run), rounds=1)
    assert torch.isfinite(prototypes).all()
    benchmark.extra_info["voxels"] = sum(case.label.size for case in labelled)
    benchmark.extra_info["extra_peak_mb"] = round(peak / 1e6)
    print(f"\n{len(labelled)} volumes, {benchmark.extra_info['voxels']:,} voxels: {peak / 1e6:.0f} MB extra")
