"""One image, with its label or without."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Case:
    """An image and its label map, resident in memory."""

    name: str
    image: np.ndarray  # [*S] float32
    label: np.ndarray  # [*S] uint8
    spacing: tuple[float, ...] | None  # mm per voxel along each axis of S; None where the files do not say


@dataclass(frozen=True)
class UnlabelledCase:
    """An image that nobody has labelled, resident in memory."""

    name: str
    image: np.ndarray  # [*S] float32
