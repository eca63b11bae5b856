"""Writing small HDF5 cases."""

from pathlib import Path

import h5py
import numpy as np


def write_case(path: Path, image: np.ndarray | None, label: np.ndarray | None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        for key, array in (("image", image), ("label", label)):
            if array is not None:
                file[key] = array


def random_case(
    random: np.random.Generator, shape: tuple[int, ...], num_classes: int
) -> tuple[np.ndarray, np.ndarray]:
    image = random.standard_normal(shape).astype(np.float32)
    return image, random.integers(0, num_classes, shape, dtype=np.uint8)
