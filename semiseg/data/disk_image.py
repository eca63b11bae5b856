"""Images that stay in their files, for data that no memory holds."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from semiseg.data.files import image_shape, read_image_box


@dataclass(frozen=True)
class DiskImage:
    """An image in an HDF5 file, of which a part of every channel is read when it is asked for."""

    path: Path
    shape: torch.Size  # [M, *S]
    axes: tuple[int, ...]  # of what is read, in the order they have here; the channels are always first
    plane: int | None = None  # of the stack that the file holds, where the image is one of its slices

    @classmethod
    def open(
        cls,
        path: Path,
        axes: int,  # that each channel must have
        channels: int = 1,
    ) -> DiskImage:
        """Raises FileNotFoundError or ValueError for what the header of the file tells."""
        return cls(path, torch.Size(image_shape(path, axes, channels)), tuple(range(1 + axes)))

    @property
    def nbytes(self) -> int:
        """Of the image as float32."""
        return 4 * self.shape.numel()

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    def to(self, device: torch.device) -> DiskImage | Tensor:
        """Itself for a CPU; for a GPU the whole image, there."""
        return self if device.type == "cpu" else self.expand().to(device)

    def transpose(
        self,
        first: int,  # from 1 on
        second: int,  # from 1 on
    ) -> DiskImage:
        swapped = list(range(len(self.axes)))
        swapped[first], swapped[second] = second, first
        return replace(
            self,
            shape=torch.Size(self.shape[axis] for axis in swapped),
            axes=tuple(self.axes[axis] for axis in swapped),
        )

    def planes(self) -> list[DiskImage]:
        """Of a stack [M, slices, H, W] as its file has it, the slices [M, H, W]."""
        channels, slices, *sides = self.shape
        shape = torch.Size([channels, *sides])
        return [replace(self, shape=shape, axes=(0, 1, 2), plane=plane) for plane in range(slices)]

    def flip(self, axes: tuple[int, ...]) -> Tensor:
        return self.expand().flip(axes)

    def __getitem__(
        self,
        box: Any,  # everything along the channels, a slice of step 1 along every other axis
    ) -> Tensor:
        """Read a part, float32. Raises ValueError for NaN and infinity, and where the file cannot be read."""
        in_file = [box[self.axes.index(axis)] for axis in range(1, len(box))]
        if self.plane is not None:
            in_file.insert(0, slice(self.plane, self.plane + 1))
        image = read_image_box(self.path, tuple(in_file), self.shape[0])
        return torch.from_numpy(image if self.plane is None else image[:, 0]).permute(self.axes)

    def expand(self) -> Tensor:  # [M, *S] float32
        """The whole image."""
        return self[tuple(slice(0, side) for side in self.shape)]
