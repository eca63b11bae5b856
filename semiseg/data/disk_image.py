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
    """An image in an HDF5 file, of which a part is read when it is asked for."""

    path: Path
    shape: torch.Size
    axes: tuple[int, ...]  # of the file, in the order they have here
    plane: int | None = None  # of the file's first axis, where the image has only the others

    @classmethod
    def open(
        cls,
        path: Path,
        axes: int,  # that the image must have
    ) -> DiskImage:
        """Raises FileNotFoundError or ValueError for what the header of the file tells."""
        return cls(path, torch.Size(image_shape(path, axes)), tuple(range(axes)))

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

    def transpose(self, first: int, second: int) -> DiskImage:
        swapped = list(range(len(self.axes)))
        swapped[first], swapped[second] = second, first
        return replace(
            self,
            shape=torch.Size(self.shape[axis] for axis in swapped),
            axes=tuple(self.axes[axis] for axis in swapped),
        )

    def planes(self) -> list[DiskImage]:
        """Of a volume as its file has it, those along the first axis."""
        return [replace(self, shape=self.shape[1:], axes=(0, 1), plane=plane) for plane in range(self.shape[0])]

    def flip(self, axes: tuple[int, ...]) -> Tensor:
        return self.expand().flip(axes)

    def __getitem__(
        self,
        box: Any,  # a slice of step 1 along every axis
    ) -> Tensor:
        """Read a part, float32. Raises ValueError for NaN and infinity, and where the file cannot be read."""
        in_file = tuple(box[self.axes.index(axis)] for axis in range(len(box)))
        if self.plane is not None:
            in_file = (slice(self.plane, self.plane + 1), *in_file)
        image = read_image_box(self.path, in_file)
        return torch.from_numpy(image if self.plane is None else image[0]).permute(self.axes)

    def expand(self) -> Tensor:  # [*S] float32
        """The whole image."""
        return self[tuple(slice(0, side) for side in self.shape)]
