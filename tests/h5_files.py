"""Writing small HDF5 cases."""

from pathlib import Path

import h5py
import numpy as np

from semiseg.data.description import DatasetDescription
from semiseg.data.preprocessing import Intensity, Preprocessing


def write_case(path: Path, image: np.ndarray | None, label: np.ndarray | None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        for key, array in (("image", image), ("label", label)):
            if array is not None:
                file[key] = array


def random_case(
    random: np.random.Generator,
    shape: tuple[int, ...],
    num_classes: int,
    channels: int | None = None,  # None: an image without an axis of them
) -> tuple[np.ndarray, np.ndarray]:
    image = random.standard_normal(shape if channels is None else (channels, *shape)).astype(np.float32)
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


def write_own(folder: Path, dimensions: int, channels: int) -> Path:
    """A folder of own data with 4 training volumes, 2 of them without a label, and 1 of validation and of test each."""
    random = np.random.default_rng(channels)
    names = ["first", "unlabelled", "second", "another", "validation", "test"]
    for name in names:
        shape = tuple(int(side) for side in random.integers(6, 12, 3))
        image, label = random_case(random, shape, 3, channels)
        has_label = name not in ("unlabelled", "another")
        write_case(folder / "cases" / f"{name}.h5", image[0] if channels == 1 else image, label if has_label else None)
    for split, cases in (("train", names[:4]), ("val", names[4:5]), ("test", names[5:])):
        (folder / f"{split}.list").write_text("".join(f"{name}\n" for name in cases))
    spacing = (1.0, 1.0, 1.5) if dimensions == 3 else None
    preprocessing = Preprocessing("LPS", spacing, (Intensity(), Intensity("unit_range"), Intensity())[:channels])
    DatasetDescription(("background", "core", "rim"), dimensions, preprocessing).save(folder / "dataset.json")
    return folder
