"""What the reference operations share: accumulation dtype, norms, cosines, convolutions, and the reading of labels."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import conv1d, conv2d, conv3d, leaky_relu, relu

from ..compilation import constant_while_compiling

EPSILON = 1e-6  # norms are clamped here, so a zero vector has cosine 0 with everything


def accumulation_dtype(x: Tensor) -> torch.dtype:
    """float64 for float64 input, float32 for everything narrower."""
    return torch.promote_types(x.dtype, torch.float32)


def flatten(
    x: Tensor,  # [B, channels, *S]
) -> Tensor:  # [B, channels, N] in the accumulation dtype
    return x.flatten(2).to(accumulation_dtype(x))


def clamped_norm(
    v: Tensor,
    dim: int,
) -> Tensor:
    """max(|v|, EPSILON) along `dim`, kept; its gradient is 0 where |v| < EPSILON."""
    # Clamping before the root keeps the gradient of sqrt finite at zero vectors.
    return v.square().sum(dim, keepdim=True).clamp_min(EPSILON**2).sqrt()


def dot(
    z: Tensor,  # [B, d, N]
    prototypes: Tensor,  # [C, K, d]
) -> Tensor:  # [B, C, K, N]
    """Dot product of every voxel with every prototype; no gradient to the prototypes."""
    # A batched product leaves z where it lies; einsum and matmul would fold the batch and copy it.
    flat = prototypes.detach().flatten(0, 1).to(z.dtype).expand(z.shape[0], -1, -1)
    return bmm(flat, z).unflatten(1, prototypes.shape[:2])


def bmm(
    a: Tensor,  # [B, m, k]
    b: Tensor,  # [B, k, n]
) -> Tensor:  # [B, m, n]
    """Batched product in the dtype of its factors, also under autocast."""
    device = a.device.type
    if not _has_autocast(device):
        return torch.bmm(a, b)
    with torch.autocast(device, enabled=False):
        return torch.bmm(a, b)


@constant_while_compiling
def _has_autocast(device: str) -> bool:
    return torch.amp.is_autocast_available(device)


def cosine(
    z: Tensor,  # [B, d, N]
    prototypes: Tensor,  # [C, K, d]
) -> Tensor:  # [B, C, K, N]
    """unit(z) . unit(p) with unit(v) = v / max(|v|, EPSILON); gradient 0 to voxels with |z| < EPSILON."""
    prototypes = prototypes.detach().to(z.dtype)
    norm = clamped_norm(z, dim=1).unsqueeze(1)  # [B, 1, 1, N]
    cosines = dot(z, prototypes / clamped_norm(prototypes, dim=2)) / norm
    return torch.where(norm > EPSILON, cosines, cosines.detach())


def class_labels(
    labels: Tensor,  # [B, *S] any integer dtype, negative = ignored
    num_classes: int,
    name: str = "labels",
) -> Tensor:  # [B, N] int64
    """The labels as int64. One >= num_classes raises ValueError on the CPU outside torch.compile, else it is ignored."""
    flat = labels.flatten(1).long()
    if _values_can_be_read(labels):
        # A uint64 beyond the range of int64 turns negative; it is out of range, not ignored.
        invalid = flat >= num_classes if labels.dtype.is_signed else (flat >= num_classes) | (flat < 0)
        if invalid.any():
            raise ValueError(
                f"{name} holds {labels.flatten(1)[invalid][0].item()}, "
                f"accepted are 0..{num_classes - 1} and negative values (ignored)"
            )
        return flat
    return torch.where(flat < num_classes, flat, -1)


def region_indices(
    regions: Tensor | None,  # [B, *S] uint8 or bool
    num_regions: int,
    like: Tensor,  # [B, N]
) -> Tensor:  # [B, N]
    """Every voxel's region, all 0 without a region map; ValueError as for labels."""
    if regions is None:
        return torch.zeros_like(like, dtype=torch.uint8)
    flat = regions.flatten(1).to(torch.uint8)
    if _values_can_be_read(regions) and flat.numel() and flat.max() >= num_regions:
        raise ValueError(f"regions holds {flat.max().item()}, accepted are 0..{num_regions - 1}")
    return flat


def _values_can_be_read(x: Tensor) -> bool:
    # Elsewhere the check would synchronise, or break the graph.
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


def convolve(
    x: Tensor,  # [B, I, *S]
    weight: Tensor,  # [O, I, *k]
    bias: Tensor | None,  # [O]
    padding: int | Sequence[int] | str = 0,
    stride: int = 1,
) -> Tensor:  # [B, O, *S']
    """PyTorch's convolution with as many axes as x has, in the dtype of x."""
    convolution = (conv1d, conv2d, conv3d)[x.dim() - 3]
    offset = None if bias is None else bias.to(x.dtype)
    return convolution(x, weight.to(x.dtype), offset, stride=stride, padding=padding)


def activate(
    x: Tensor,
    negative_slope: float,
    inplace: bool = False,
) -> Tensor:
    """ReLU, leaky with a slope other than 0; x itself with 1."""
    if negative_slope == 1:
        return x
    return leaky_relu(x, negative_slope, inplace) if negative_slope else relu(x, inplace)
