"""Validation of the public operations' arguments: a ValueError names what was given and what is accepted."""

from collections.abc import Sequence

import torch
from torch import Tensor

KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FLOAT_DTYPES = (*KERNEL_DTYPES, torch.float64)  # float64 on the reference only
INTEGER_DTYPES = (
    torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32, torch.uint64,
)  # fmt: skip
WEIGHT_DTYPES = (torch.bool, torch.uint8, *KERNEL_DTYPES)
REGION_DTYPES = (torch.uint8, torch.bool)


def check_voxels(
    name: str,
    x: Tensor,  # [B, channels, *S]
) -> None:
    check_dtype(name, x, FLOAT_DTYPES)
    if not 3 <= x.dim() <= 5:
        raise ValueError(f"{name} has shape {list(x.shape)}, accepted is [B, channels, *S], *S 1 to 3 axes")
    if x.shape[1] == 0:
        raise ValueError(f"{name} has shape {list(x.shape)}, accepted is at least one channel")


def check_prototypes(
    z: Tensor,  # [B, d, *S]
    prototypes: Tensor,  # [C, K, d]
) -> None:
    check_voxels("z", z)
    check_dtype("prototypes", prototypes, (torch.float32, z.dtype))
    if prototypes.dim() != 3 or prototypes.shape[2] != z.shape[1] or prototypes.numel() == 0:
        accepted = f"[C, K, {z.shape[1]}] with C, K >= 1"
        raise ValueError(f"prototypes has shape {list(prototypes.shape)}, accepted is {accepted}")
    check_device("prototypes", prototypes, z)


def check_per_voxel(
    name: str,
    values: Tensor | None,  # [B, *S]
    x: Tensor,  # [B, channels, *S]
    dtypes: tuple[torch.dtype, ...],
) -> None:
    if values is None:
        return
    check_dtype(name, values, dtypes)
    check_shape(name, values, (x.shape[0], *x.shape[2:]))
    check_device(name, values, x)


def check_maps(
    name: str,
    maps: Tensor,  # [B, C, *S]
    x: Tensor,  # [B, channels, *S]
    dtypes: tuple[torch.dtype, ...],
) -> None:
    check_dtype(name, maps, dtypes)
    batch, _, *spatial = x.shape
    if maps.dim() != x.dim() or maps.shape[1] == 0 or list(maps.shape) != [batch, maps.shape[1], *spatial]:
        accepted = ", ".join(map(str, [batch, "C", *spatial]))
        raise ValueError(f"{name} has shape {list(maps.shape)}, accepted is [{accepted}] with C >= 1")
    check_device(name, maps, x)


def check_text(
    text: Tensor,  # [C, E]
    logits: Tensor,  # [B, C, *S]
    dtype: torch.dtype,
) -> None:
    check_dtype("text", text, (*KERNEL_DTYPES, dtype))
    if text.dim() != 2 or text.shape[0] != logits.shape[1] or text.numel() == 0:
        raise ValueError(f"text has shape {list(text.shape)}, accepted is [{logits.shape[1]}, E] with E >= 1")
    check_device("text", text, logits)


def check_convolution(
    weight: Tensor,  # [O, channels, *k], transposed [channels, O, *k]
    bias: Tensor | None,  # [O]
    padding: int | Sequence[int] | str,
    x: Tensor,  # [B, *, *S]
    channels: int,
    transposed: bool = False,
) -> None:
    check_dtype("weight", weight, (*KERNEL_DTYPES, x.dtype))
    axes = x.dim() - 2
    read, written = (0, 1) if transposed else (1, 0)
    if weight.dim() != x.dim() or weight.shape[read] != channels or weight.numel() == 0:
        sides = [str(channels), "O"] if transposed else ["O", str(channels)]
        accepted = ", ".join([*sides, *["k"] * axes])
        raise ValueError(f"weight has shape {list(weight.shape)}, accepted is [{accepted}] with O, k >= 1")
    check_device("weight", weight, x)
    if bias is not None:
        check_dtype("bias", bias, (*KERNEL_DTYPES, x.dtype))
        check_shape("bias", bias, (weight.shape[written],))
        check_device("bias", bias, x)
    sizes = padding if isinstance(padding, str | Sequence) else [padding] * axes
    if sizes not in ("same", "valid") and (len(sizes) != axes or not all(_is_size(size) for size in sizes)):
        accepted = f"a number >= 0, {axes} of them, 'same' and 'valid'"
        raise ValueError(f"padding is {padding!r}, accepted are {accepted}")


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def check_regions(
    regions: Tensor | None,  # [B, *S]
    num_regions: int | None,
    x: Tensor,  # [B, channels, *S]
) -> None:
    check_per_voxel("regions", regions, x, REGION_DTYPES)
    if num_regions is not None and not 1 <= num_regions <= 256:
        raise ValueError(f"num_regions is {num_regions}, accepted are 1..256")


def check_label_map(
    name: str,
    label: Tensor,  # [B, *S]
) -> None:
    check_dtype(name, label, (torch.uint8,))
    if not 2 <= label.dim() <= 4 or label.shape[1:].numel() >= 2**31:
        accepted = "[B, *S], *S 1 to 3 axes of fewer than 2^31 voxels"
        raise ValueError(f"{name} has shape {list(label.shape)}, accepted is {accepted}")


def check_ignore_prototype(
    ignore_prototype: int | None,
    prototypes: Tensor,  # [C, K, d]
) -> None:
    count = prototypes.shape[0] * prototypes.shape[1]
    if ignore_prototype is not None and not 0 <= ignore_prototype < count:
        raise ValueError(f"ignore_prototype is {ignore_prototype}, accepted are None and 0..{count - 1}")


def check_positive(name: str, value: float) -> None:
    check_number(name, value)
    if not 0 < value < float("inf"):
        raise ValueError(f"{name} is {value}, accepted are finite numbers above 0")


def check_fraction(name: str, value: float) -> None:
    check_number(name, value)
    if not 0 <= value <= 1:
        raise ValueError(f"{name} is {value}, accepted are 0..1")


def check_number(name: str, value: float) -> None:
    """None, text, and what is to be learned, which would get no gradient without a word, are none."""
    if value is None or isinstance(value, str):
        raise ValueError(f"{name} is {value!r}, accepted are numbers")
    if isinstance(value, Tensor) and value.requires_grad:
        raise ValueError(f"{name} requires a gradient, accepted are numbers, to which none flows")


def check_tensor(name: str, x: Tensor) -> None:
    if not isinstance(x, Tensor):
        raise ValueError(f"{name} is of type {type(x).__name__}, accepted is a tensor")


def check_dtype(name: str, x: Tensor, accepted: tuple[torch.dtype, ...]) -> None:
    check_tensor(name, x)
    if x.dtype not in accepted:
        names = ", ".join(dict.fromkeys(str(dtype).removeprefix("torch.") for dtype in accepted))
        raise ValueError(f"{name} has dtype {str(x.dtype).removeprefix('torch.')}, accepted are {names}")


def check_shape(name: str, x: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(x.shape) != tuple(shape):
        raise ValueError(f"{name} has shape {list(x.shape)}, accepted is {list(shape)}")


def check_written(name: str, values: Tensor) -> None:
    """What is changed in place must not be an expanded tensor."""
    if any(stride == 0 and size > 1 for stride, size in zip(values.stride(), values.shape, strict=True)):
        raise ValueError(
            f"{name} has strides {list(values.stride())}, accepted are elements with memory of their own"
        )


def check_device(name: str, x: Tensor, like: Tensor) -> None:
    if x.device != like.device:
        raise ValueError(f"{name} is on {x.device}, accepted is {like.device}")


def check_choice(name: str, value: str, accepted: tuple[str, ...]) -> None:
    if value not in accepted:
        raise ValueError(f"{name} is {value!r}, accepted are {', '.join(map(repr, accepted))}")


def check_absent_without_labels(**given: bool) -> None:
    for name, is_given in given.items():
        if is_given:
            raise ValueError(f"{name} is given without labels, accepted with labels only")
