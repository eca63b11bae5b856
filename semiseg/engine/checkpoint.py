"""Checkpoints: a method's tensors in one safetensors file, with the iteration in its metadata."""

import os
import textwrap
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from semiseg.atomic import replace_atomically

LONGEST_REASON = 200  # characters; PyTorch lists every tensor that does not fit


def save_checkpoint(path: Path, method: nn.Module, *, iteration: int, **metadata: object) -> None:
    """Write the state of a method; a reader sees the old file or the whole new one.

    Raises FloatingPointError where it holds NaN or infinity, OSError where it cannot be written; the old file stays.
    """
    metadata = {"iteration": iteration, **metadata}
    write_tensors(path, method.state_dict(), {key: str(value) for key, value in metadata.items()}, iteration)


def load_checkpoint(path: Path, method: nn.Module, device: torch.device | str = "cpu") -> dict[str, str]:
    """Load a state into a method and return the metadata.

    Raises FileNotFoundError, or ValueError where the file is damaged or belongs to another configuration.
    """
    state, metadata = read_tensors(path, device)
    load_into(method, state, path)
    return metadata


def write_tensors(
    path: Path,
    tensors: Mapping[str, Tensor],
    metadata: dict[str, str],
    iteration: int,  # after which the tensors are such
) -> None:
    """Write named tensors and texts, atomically. Raises as `save_checkpoint` does."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise FloatingPointError(f"{name} holds NaN or infinity after iteration {iteration}")
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with replace_atomically(path) as temporary, temporary.open("wb") as file:
        # save_file would use a temporary name of its own, which one that is killed leaves behind.
        file.write(save(state, metadata))
        file.flush()
        os.fsync(file.fileno())  # or a power failure after the renaming could leave an empty file


def read_tensors(path: Path, device: torch.device | str = "cpu") -> tuple[dict[str, Tensor], dict[str, str]]:
    """What `write_tensors` wrote. Raises FileNotFoundError, or ValueError where the file is damaged."""
    if not os.path.isfile(path):
        raise FileNotFoundError(f"checkpoint {path} does not exist")
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            metadata = file.metadata() or {}
            return {name: file.get_tensor(name) for name in file.keys()}, metadata  # noqa: SIM118 (not a mapping)
    except SafetensorError as error:
        raise ValueError(f"checkpoint {path} is damaged: {error}") from None


def load_into(method: nn.Module, state: Mapping[str, Tensor], path: Path) -> None:
    """Load a state read from `path` into a method. Raises ValueError where it does not fit."""
    try:
        method.load_state_dict(state)
    except RuntimeError as error:
        reason = textwrap.shorten(str(error).splitlines()[1], LONGEST_REASON, placeholder=" ...")
        raise ValueError(f"checkpoint {path} does not fit the configuration: {reason}") from None
