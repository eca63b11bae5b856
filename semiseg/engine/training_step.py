"""One step of training: the losses of a batch, their gradients, the optimiser, and what the method moves with it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields

import torch
from torch import Tensor

from semiseg.config import Config
from semiseg.engine.cuda_graph import CudaGraph
from semiseg.engine.distributed import Processes, gradients
from semiseg.engine.precision import autocast
from semiseg.methods import Method, Stage
from semiseg.methods.method import Batch, add_losses
from semiseg_kernels import recomputed_results
from semiseg_kernels.backends import has_gpu_kernels


def check_cuda_graph(config: Config, device: torch.device, processes: Processes) -> None:
    """Raise ValueError where a step is to be a CUDA graph and cannot."""
    if config.training.cuda_graph and not _can_be_a_graph(device, processes):
        raise ValueError(
            f"training.cuda_graph is true on {device.type} with {processes.count} processes, accepted is one process "
            "on a GPU with a cuda or triton backend"
        )


def is_cuda_graph(config: Config, device: torch.device, processes: Processes) -> bool:
    """Whether a step is a CUDA graph: as asked for, else where it can be."""
    asked = config.training.cuda_graph
    return _can_be_a_graph(device, processes) if asked is None else asked


def _can_be_a_graph(device: torch.device, processes: Processes) -> bool:
    return device.type == "cuda" and processes.count == 1 and has_gpu_kernels(device)


class TrainingStep:
    """The step of a stage; on one GPU its work is captured once and replayed, see `training.cuda_graph`."""

    def __init__(
        self,
        config: Config,
        method: Method,
        stage: Stage,
        optimiser: torch.optim.Optimizer,
        device: torch.device,
        processes: Processes,
    ) -> None:
        self.config, self.method, self.stage = config, method, stage
        self.optimiser, self.device, self.processes = optimiser, device, processes
        is_graph = is_cuda_graph(config, device, processes)
        self._graph = CudaGraph(device) if is_graph else None

    def __call__(
        self,
        batch: Batch,
        iteration: int,  # of the stage, from 0
    ) -> dict[str, Tensor]:
        """The losses of the step and what else is logged."""
        learning_rate = self.stage.learning_rate(self.config.training.learning_rate, iteration)
        for group in self.optimiser.param_groups:
            group["lr"] = learning_rate
        given = {**vars(batch), **self.stage.inputs(batch, iteration)}
        return self._run(given) if self._graph is None else self._graph(self._run, given, learning_rate)

    def _run(self, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
        batch = Batch(**{field.name: given[field.name] for field in fields(Batch)})
        self.optimiser.zero_grad(set_to_none=True)
        values = add_losses(self._minimised_parts(batch, given))
        self.processes.average([*gradients(self.method), *values.values()])
        self.optimiser.step()
        self.stage.update()
        return values

    def _minimised_parts(self, batch: Batch, given: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
        parts = self.stage.parts(batch, given)
        while True:
            with autocast(self.config, self.device), recomputed_results():
                losses = next(parts, None)
            if losses is None:
                return
            losses["total"].backward()
            yield {name: loss.detach() for name, loss in losses.items()}
