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


def write_left_atrium(folder: Path) -> Path:
    """A left atrium folder of 5 training and 2 test volumes."""
    random = np.random.default_rng(0)
    for number in range(7):
        shape = tuple(int(side) for side in random.integers(6, 12, 3))
        case = folder / "2018LA_Seg_Training Set" / f"CASE{number}"
        write_case(case / "mri_norm2.h5", *random_case(random, shape, 2))
    (folder / "train.list").write_text("CASE3\nCASE1\nCASE4\nCASE0\nCASE2\n")
    (folder / "test.list").write_text("CASE5\nCASE6\n")
    return folder
