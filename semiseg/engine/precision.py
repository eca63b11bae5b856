"""The number format a network computes in: float32, or bfloat16 by autocast where that is quicker."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from semiseg.config import Config

# oneDNN's gradient of a bfloat16 3x3x3 convolution's weights, as computed with AVX512-BF16, reads memory that was never
# written where the first side is 2, which some stage of the V-Net meets with patches of these first sides.
UNSAFE_FIRST_SIDES = (16, 32)
# With AVX512-BF16 alone the convolutions of semiseg_kernels are as quick in float32.
BFLOAT16_UNITS = "amx_bf16"
AMPERE = (8, 0)  # the first compute capability with bfloat16


def check_precision(config: Config, device: torch.device) -> None:
    """Raise ValueError where bfloat16 is asked for and would give wrong gradients."""
    if config.training.precision == "bfloat16" and _is_unsafe(config, device):
        raise ValueError(
            f"training.precision is bfloat16 and training.patch_size {list(config.training.patch_size)}, accepted on "
            "the CPU are auto and float32 where the first side is "
            + " or ".join(map(str, UNSAFE_FIRST_SIDES))
        )


def precision(config: Config, device: torch.device) -> str:
    """What `training.precision` comes to on a device: float32 or bfloat16.

    `auto` is bfloat16 where it is quicker (on a GPU of compute capability 8.0 on and a CPU with AMX) and its gradients
    can be trusted.
    """
    if config.training.precision != "auto":
        return config.training.precision
    return "bfloat16" if has_bfloat16(device) and not _is_unsafe(config, device) else "float32"


def autocast(config: Config, device: torch.device) -> AbstractContextManager[Any]:
    """The context a network's forward pass runs in, for training and evaluation."""
    if precision(config, device) == "float32":
        return nullcontext()
    return torch.autocast(device.type, torch.bfloat16)


def has_bfloat16(device: torch.device) -> bool:
    """Whether a device has units for matrices in bfloat16; elsewhere float32 is as quick or quicker."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= AMPERE
    return torch.cpu.get_capabilities().get(BFLOAT16_UNITS, False)


def _is_unsafe(config: Config, device: torch.device) -> bool:
    patch_size = config.training.patch_size
    return device.type == "cpu" and len(patch_size) == 3 and patch_size[0] in UNSAFE_FIRST_SIDES
