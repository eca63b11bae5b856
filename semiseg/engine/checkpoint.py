"""Checkpoints: a method's tensors in one safetensors file, with the iteration in its metadata."""

import os
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from semiseg.engine.atomic import replace_atomically


def save_checkpoint(path: Path, method: nn.Module, **metadata: object) -> None:
    """Write the state of a method; a reader sees the old file or the whole new one."""
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in method.state_dict().items()}
    with replace_atomically(path) as temporary:
        save_file(state, temporary, {key: str(value) for key, value in metadata.items()})


def load_checkpoint(path: Path, method: nn.Module, device: torch.device | str = "cpu") -> dict[str, str]:
    """Load a state into a method and return the metadata.

    Raises FileNotFoundError, or ValueError where the file is damaged or belongs to another configuration.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f"checkpoint {path} does not exist")
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            metadata = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except SafetensorError as error:
        raise ValueError(f"checkpoint {path} is damaged: {error}") from None
    try:
        method.load_state_dict(state)
    except RuntimeError as error:
        reason = str(error).splitlines()[1].strip()
        raise ValueError(f"checkpoint {path} does not fit the configuration: {reason}") from None
    return metadata
