"""A small dataset of one's own: NIfTI images, and labels for some of them."""

from pathlib import Path

import nibabel
import numpy as np
from challenge_files import anatomy
from scipy.spatial.transform import Rotation

SPACING = (1.2, 1.0, 2.5)  # mm, towards the right, anterior and superior
VALUES = np.array([0, 1, 3, 7])  # of the labels: background and three classes
OBLIQUE = Rotation.from_euler("xyz", (7, -5, 10), degrees=True).as_matrix()


def affine(spacing: tuple[float, ...] = SPACING) -> np.ndarray:
    """Oblique, its axes nearest to the right, anterior and superior."""
    matrix = np.eye(4)
    matrix[:3, :3] = OBLIQUE * spacing
    matrix[:3, 3] = (-20, 35, 110)
    return matrix


def write_image(path: Path, values: np.ndarray, placed: np.ndarray) -> None:
    """Write int16 with a slope and an intercept."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = nibabel.Nifti1Image(values.astype(np.float32), placed)
    image.set_data_dtype(np.int16)
    nibabel.save(image, path)


def write_label(path: Path, values: np.ndarray, placed: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(values.astype(np.uint8), placed), path)


def own_source(
    root: Path,
    labelled: int = 6,
    unlabelled: int = 2,
    shape: tuple[int, int, int] = (40, 36, 16),
) -> tuple[Path, Path]:
    """Folders of images and of labels for the first of them; the cases are called scan_0, scan_1 ..."""
    random = np.random.default_rng(0)
    for number in range(labelled + unlabelled):
        image, label = anatomy(random, shape, len(VALUES))
        write_image(root / "images" / f"scan_{number}.nii.gz", image + 100, affine())
        if number < labelled:
            write_label(root / "labels" / f"scan_{number}.nii.gz", VALUES[label], affine())
    return root / "images", root / "labels"
