"""Images of few different values, such as scans of 8 bits after a normalisation, in a quarter of the memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

MOST_VALUES = 256
SAMPLE = 4096  # voxels in which values are looked for at a time


@dataclass(frozen=True)
class CompactImage:
    """An image as one index per voxel into a table of its channel's values; slicing and copying work as on a tensor."""

    indices: Tensor  # [M, *S] uint8
    values: tuple[Tensor, ...]  # M of [n] float32

    @property
    def shape(self) -> torch.Size:
        return self.indices.shape

    @property
    def nbytes(self) -> int:
        return self.indices.nbytes + sum(values.nbytes for values in self.values)

    @property
    def device(self) -> torch.device:
        return self.indices.device

    def to(self, device: torch.device) -> CompactImage:
        return CompactImage(self.indices.to(device), tuple(values.to(device) for values in self.values))

    def transpose(
        self,
        first: int,  # from 1 on
        second: int,  # from 1 on
    ) -> CompactImage:
        return CompactImage(self.indices.transpose(first, second), self.values)

    def flip(
        self,
        axes: tuple[int, ...],  # from 1 on
    ) -> CompactImage:
        return CompactImage(self.indices.flip(axes), self.values)

    def __getitem__(
        self,
        box: Any,  # everything along the channels
    ) -> CompactImage:
        return CompactImage(self.indices[box], self.values)

    def expand(self) -> Tensor:  # [M, *S] float32
        """The image itself, bit for bit, on whatever device it is."""
        channels = zip(self.values, self.indices.flatten(1), strict=True)
        return torch.stack([values.index_select(0, indices.int()) for values, indices in channels]).view(self.shape)


def compact(
    image: np.ndarray,  # [M, *S] float32
) -> Tensor | CompactImage:
    """An image of at most 256 values a channel as a CompactImage where that halves the memory of each at least, else as
    it is, shared."""
    tensor = torch.as_tensor(image, dtype=torch.float32)
    indices, values = [], []
    for channel in tensor:
        found = _indexed(channel.flatten())
        if found is None:
            return tensor
        indices.append(found[0])
        values.append(found[1])
    return CompactImage(torch.stack(indices).view(tensor.shape), tuple(values))


def _indexed(
    voxels: Tensor,  # [N] float32
) -> tuple[Tensor, Tensor] | None:  # [N] uint8 into [n] float32
    missing = voxels
    indices, values = torch.zeros_like(voxels, dtype=torch.int32), voxels[:0]
    while missing.numel():
        before = len(values)
        # The first look finds nearly all values of a scan, and more than there may be in an image of noise.
        found = missing[:: max(missing.numel() // SAMPLE, 1)]
        values = torch.cat([values, found]).unique()
        if not before < len(values) <= MOST_VALUES or 2 * (voxels.numel() + values.nbytes) > voxels.nbytes:
            return None
        indices = torch.searchsorted(values, voxels, out_int32=True).clamp_(max=len(values) - 1)
        # As bits: 0 and -0 are not the same.
        missing = voxels[values.index_select(0, indices).view(torch.int32) != voxels.view(torch.int32)]
    return (indices.byte(), values) if len(voxels) else None
