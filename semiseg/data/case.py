"""One image, with its label or without."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from semiseg.data.disk_image import DiskImage


@dataclass(frozen=True)
class Case:
    """An image and its label map, resident in memory."""

    name: str
    image: np.ndarray  # [M, *S] float32, of M channels
    label: np.ndarray  # [*S] uint8
    spacing: tuple[float, ...] | None  # mm per voxel along each axis of S; None where the files do not say


@dataclass(frozen=True)
class UnlabelledCase:
    """An image that nobody has labelled, resident in memory or left in its file."""

    name: str
    image: np.ndarray | DiskImage  # [M, *S] float32
