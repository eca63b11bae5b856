"""What the launches share: the compiled modules, and tensors as they see them."""

import importlib
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

MODULES = {"cpu": "semiseg_kernels._C", "cuda": "semiseg_kernels._CUDA"}  # of the backends written in C++
# In the order of DataType in csrc/voxels.h.
_DATA_TYPES = (
    torch.float32, torch.bfloat16, torch.float16, torch.bool, torch.uint8, torch.int8, torch.uint16, torch.int16,
    torch.uint32, torch.int32, torch.uint64, torch.int64,
)  # fmt: skip

# What a kernel sees of a tensor: address, data type, sizes and strides of [batch, channels, voxels].
Voxels = tuple[int, int, int, int, int, int, int, int]


@cache
def extension(backend: str) -> ModuleType:
    """The compiled module of a backend; raises ImportError where it was not built.

    It is imported after torch, so that both share the OpenMP runtime torch brings.
    """
    return importlib.import_module(MODULES[backend])


def launch(
    backend: str,
    name: str,  # of the function in the backend's module
    device: torch.device,
    **arguments: Any,
) -> tuple[int, ...]:
    """Call a compiled operation with its arguments and with what it needs to know about the machine.

    On the CPU that is the number of threads; the result is what the operation has to tell: the highest label and the
    highest region that it met, where it looks at them, or how much memory it needs. On a GPU it is the device, the
    stream, and a workspace whose size the operation itself tells when it is called without one; the result is empty,
    as reading it back would synchronise. An emulated GPU has neither devices nor streams.
    """
    operation = getattr(extension(backend), name)
    if backend == "cpu":
        return operation(**arguments, threads=torch.get_num_threads())
    on_gpu = device.type == "cuda"
    arguments["device"] = device.index if on_gpu else 0
    arguments["stream"] = torch.cuda.current_stream(device).cuda_stream if on_gpu else 0
    size = operation(**arguments, workspace=0)
    workspace = torch.empty(max(size, 1), dtype=torch.uint8, device=device)  # nothing would have no address
    operation(**arguments, workspace=workspace.data_ptr())
    return ()


def voxels(x: Tensor | None) -> Voxels | None:
    """The address and layout of `x` [B, channels, voxels] (see `layouts.readable`)."""
    if x is None:
        return None
    batch_stride, channel_stride, voxel_stride = x.stride()
    if x.shape[1] <= 1:
        channel_stride = 1
    if x.shape[2] <= 1:
        voxel_stride = 1
    layout = (*x.shape, batch_stride, channel_stride, voxel_stride)
    return (x.data_ptr(), _DATA_TYPES.index(x.dtype), *layout)


def voxel_map(x: Tensor | None) -> Tensor | None:
    """Labels, regions or weights [B, *S] as [B, 1, voxels], contiguous."""
    return None if x is None else x.contiguous().flatten(1).unsqueeze(1)


def address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def check_highest(highest: tuple[int, ...], **limits: int) -> None:
    """Raise ValueError if a kernel met a value beyond its limit - 1; `highest` is in the order of the names."""
    for (name, limit), value in zip(limits.items(), highest, strict=False):
        if value >= limit:
            negative = "" if name == "regions" else " and negative values (ignored)"
            raise ValueError(f"{name} holds {value}, accepted are 0..{limit - 1}{negative}")
