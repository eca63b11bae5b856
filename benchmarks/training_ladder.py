"""From a plain trainer to this one, lever by lever: python benchmarks/training_ladder.py [WORKLOAD ...] [--results FILE]

The plain trainer is what released code does: float32, contiguous tensors, losses and layers as chains of PyTorch's
operations (the backend `reference`), components labelled by scipy, every image read from its HDF5 file for every batch,
and an allocator that hands freed memory back. Each rung adds one lever to those before it, in a process of its own. The
datasets are looked for in $SEMISEG_DATA.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import h5py
import torch
from ladder import climb, kernels_of, prepare
from memory import page_faults
from torch import Tensor, nn

from semiseg.config import Config
from semiseg.data import Augmentation, TrainingSampler, TrainingTensors, acdc, volumes
from semiseg.engine.distributed import Processes
from semiseg.engine.trainer import build_method, build_optimiser, open_configured_dataset
from semiseg.engine.training_step import TrainingStep
from semiseg.methods import METHODS
from semiseg.methods.method import Batch, add_losses
from semiseg.models.dropout import Dropout

CPU = torch.device("cpu")
WARM_UP, MEASURED = 2, 3  # steps

# From the plain trainer to the full one.
LEVERS = ("kept heap", "data in memory", "fused losses", "components in C++", "fused batch normalisation",
          "fused classifier", "quick dropout", "channels last", "own convolutions",
          "losses in parts", "tight heap", "huge pages", "bfloat16")  # fmt: skip
WORKLOADS = {  # a configuration whose last stage is measured, and what differs from it
    "la_mper": (),
    "la_vclipseg": ("method.text=random",),
    "acdc_mper": (),
    "acdc_vclipseg_small": ("training.patch_size=[256, 256]", "training.labelled_batch=12", "training.unlabelled_batch=12"),
}  # fmt: skip


class CasesOnDisk(Sequence[tuple[Tensor, ...]]):
    """Cases that are read from their files whenever they are asked for."""

    def __init__(self, paths: Sequence[Path], keys: Sequence[str]) -> None:
        self.paths, self.keys = paths, keys
        self._read = functools.lru_cache(maxsize=1)(self._read_file)  # one item is asked for twice in a row

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:  # type: ignore[override]
        return self._read(index)

    def _read_file(self, index: int) -> tuple[Tensor, ...]:
        with h5py.File(self.paths[index]) as file:
            return tuple(torch.from_numpy(file[key][()]).unsqueeze(0) for key in self.keys)


def training_data(config: Config, in_memory: bool) -> Any:
    """What a TrainingSampler draws from."""
    dataset = open_configured_dataset(config)
    assert isinstance(dataset, volumes.Volumes)
    if in_memory:
        return TrainingTensors(*dataset.training_cases(config.dataset.labelled), CPU)
    names = dataset.training_names()
    if isinstance(dataset, acdc.ACDC):
        paths = [acdc.slice_path(dataset.root, name) for name in names]
        count = len(dataset.training_cases(config.dataset.labelled)[0])
    else:
        paths = [dataset.path(name) for name in names]
        count = config.dataset.labelled
    return SimpleNamespace(
        labelled=CasesOnDisk(paths[:count], ("image", "label")),
        unlabelled=CasesOnDisk(paths[count:], ("image",)),
        channels=1,
        device=CPU,
        storage=CPU,
        on_disk=False,  # read here in turn, not ahead
    )


def measure(workload: str, levers: Sequence[str]) -> dict[str, Any]:
    """Seconds of each measured step, of drawing its batch alone, page faults, and the last loss."""
    config = prepare(workload, WORKLOADS[workload], levers)
    torch.manual_seed(config.seed)
    class_names = open_configured_dataset(config).class_names
    text = METHODS[config.method.name].text(config, class_names)
    method = build_method(config, len(class_names), CPU, text)
    stage = method.stages(torch.Generator().manual_seed(config.seed))[-1]
    if method.prototypes is not None:
        method.prototypes.normal_()
    training = config.training
    sampler = TrainingSampler(
        training_data(config, "data in memory" in levers),
        Augmentation(config.dataset.augmentation, training.patch_size),
        training.labelled_batch,
        training.unlabelled_batch,
        seed=config.seed,
    )
    if "losses in parts" not in levers:
        parts = stage.parts
        stage.parts = lambda *arguments: iter([add_losses(parts(*arguments))])  # type: ignore[method-assign]
    take_step = TrainingStep(config, method, stage, build_optimiser(config, method), CPU, Processes())
    method.network.train()
    rows = []
    quick = "quick dropout" in levers
    with (
        kernels_of(levers),
        nullcontext() if quick else mock.patch.object(Dropout, "forward", nn.Dropout.forward),
    ):
        for step in range(WARM_UP + MEASURED):
            started, faults = time.perf_counter(), page_faults()
            batch = Batch(*sampler.next())
            drawn = time.perf_counter()
            losses = take_step(batch, step)
            rows.append(
                (
                    time.perf_counter() - started,
                    drawn - started,
                    page_faults() - faults,
                    float(losses["total"]),
                )
            )
    seconds, drawing, faults, losses = zip(*rows[WARM_UP:], strict=True)
    return {
        "seconds": statistics.median(seconds),
        "seconds_of_steps": seconds,
        "seconds_of_drawing": statistics.median(drawing),
        "page_faults": statistics.median(faults),
        "loss": losses[-1],
    }


if __name__ == "__main__":
    assert __doc__ is not None
    climb(__doc__, tuple(WORKLOADS), LEVERS, measure)
