"""The state of a run that is not finished: one file from which training resumes as if it had never stopped.

On several processes that is so but for their random states, of which the file holds the first one's alone: dropout's
masks are drawn anew.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from semiseg.config import Config, config_from_mapping, config_to_mapping, flatten
from semiseg.data import TrainingSampler
from semiseg.engine.checkpoint import load_into, read_tensors, write_tensors
from semiseg.engine.run_directory import RESUMED_WITH
from semiseg.methods import Method

DIVIDER = "/"  # between the keys of nested mappings; names of parameters hold dots
METADATA = "training_state"  # where the file keeps what is no tensor, as JSON


class TrainingState:
    """What a file of `save_training_state` holds.

    iteration, stage, step: how many iterations are done over all stages, the number of the stage under way, and how
    many of its own are done. best: Dice of the best checkpoint so far. log_sizes: of MetricsLog.
    """

    iteration: int
    stage: int
    step: int
    best: float
    log_sizes: dict[str, int]

    def __init__(self, path: Path, config: Config):
        """Read the state of a run with this configuration.

        Raises FileNotFoundError, or ValueError where the file is damaged or belongs to another configuration.
        """
        tensors, metadata = read_tensors(path)
        if METADATA not in metadata:
            raise ValueError(f"checkpoint {path} holds no training state")
        values = _unflatten({**json.loads(metadata[METADATA]), **tensors})
        # Built anew, as keys may have come since, with what has always been so as their default.
        try:
            written = config_to_mapping(config_from_mapping(values["config"]))
        except ValueError as error:
            raise ValueError(f"checkpoint {path} belongs to another configuration: {error}") from None
        self._check_config(path, written, config_to_mapping(config))
        self._path, self._values = path, values
        for name in ("iteration", "stage", "step", "best", "log_sizes"):
            setattr(self, name, values[name])

    @staticmethod
    def _check_config(path: Path, written: dict[str, Any], given: dict[str, Any]) -> None:
        before, now = flatten(written), flatten(given)
        for key in sorted({*before, *now}.difference(RESUMED_WITH)):
            if before.get(key) != now.get(key):
                raise ValueError(
                    f"checkpoint {path} belongs to another configuration: {key} was "
                    f"{before.get(key)!r} and is {now.get(key)!r} here"
                )

    def restore(self, method: Method, generator: torch.Generator, device: torch.device) -> None:
        """Put the method and the random states back. Raises ValueError where the method is another."""
        load_into(method, self._values["method"], self._path)
        for name, module in method.named_modules():
            module.training = name not in self._values["evaluating"]
        random = self._values["random"]
        torch.set_rng_state(random["torch"])
        generator.set_state(random["method"])
        if device.type == "cuda" and "cuda" in random:
            torch.cuda.set_rng_state(random["cuda"], device)

    def restore_stage(self, sampler: TrainingSampler, optimiser: torch.optim.Optimizer) -> None:
        """Put back what belongs to the stage under way. Raises ValueError where there are other training cases."""
        sampler.load_state_dict(self._values["sampler"])
        # In the order in which the optimiser's state_dict numbers them.
        parameters = [parameter for group in optimiser.param_groups for parameter in group["params"]]
        for number, buffers in self._values.get("optimiser", {}).items():
            parameter = parameters[int(number)]
            # In the parameter's memory format again: arithmetic over another one may round otherwise.
            optimiser.state[parameter] = {
                name: torch.empty_like(parameter).copy_(buffer) for name, buffer in buffers.items()
            }


def save_training_state(
    path: Path,
    *,
    config: Config,
    method: Method,
    generator: torch.Generator,  # of the method's stages
    device: torch.device,
    iteration: int,  # done, over all stages
    stage: int,  # number of the one under way
    step: int,  # iterations done of that stage
    sampler: TrainingSampler,  # of that stage, as the optimiser is
    optimiser: torch.optim.Optimizer,
    best: float,
    log_sizes: dict[str, int],
) -> None:
    """Write all that the iterations to come depend on into one file; a reader sees the old one or the whole new one.

    Raises FloatingPointError where a tensor holds NaN or infinity, OSError where the file cannot be written; the old
    one stays.
    """
    random = {"torch": torch.get_rng_state(), "method": generator.get_state()}
    if device.type == "cuda":
        random["cuda"] = torch.cuda.get_rng_state(device)
    values = {
        "config": config_to_mapping(config),
        "iteration": iteration,
        "stage": stage,
        "step": step,
        "best": best,
        "log_sizes": log_sizes,
        "method": method.state_dict(),
        "evaluating": [name for name, module in method.named_modules() if not module.training],
        "random": random,
        "sampler": sampler.state_dict(),
        "optimiser": optimiser.state_dict()["state"],
    }
    flat = flatten(values, DIVIDER)
    tensors = {name: value for name, value in flat.items() if isinstance(value, Tensor)}
    plain = {name: value for name, value in flat.items() if name not in tensors}
    write_tensors(path, tensors, {METADATA: json.dumps(plain)}, iteration)


def saved_iteration(path: Path) -> int:
    """How many iterations were done when a state was written."""
    _, metadata = read_tensors(path)
    return json.loads(metadata[METADATA])["iteration"]


def _unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    nested: dict[str, Any] = {}
    for name, value in flat.items():
        *parents, key = name.split(DIVIDER)
        place = nested
        for parent in parents:
            place = place.setdefault(parent, {})
        place[key] = value
    return nested
