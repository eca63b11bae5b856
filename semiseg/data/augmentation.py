"""Random crops, rotations and flips. All randomness comes from the generator the caller gives."""

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

ROTATION_DEGREES = 20.0

Pair = tuple[np.ndarray, np.ndarray | None]  # image [*S] float32 and label [*S] uint8, or no label


@dataclass(frozen=True)
class Augmentation:
    """What happens to a training case before it enters a batch.

    crop_rotate_flip: rot90 + flip in plane, then a random crop (left atrium, phantom).
    rotate_flip_resize: with probability 1/2 rot90 + flip, else with probability 1/2 a rotation by up to 20
    degrees; then a resize to the patch (ACDC slices).
    crop: a random crop only (pancreas).
    """

    name: str
    patch: tuple[int, ...]  # shape of what comes out

    def __post_init__(self) -> None:
        accepted = {"crop_rotate_flip": (2, 3), "rotate_flip_resize": (2,), "crop": (2, 3)}
        if self.name not in accepted:
            raise ValueError(
                f"augmentation name is {self.name!r}; accepted are {', '.join(sorted(accepted))}"
            )
        if len(self.patch) not in accepted[self.name] or min(self.patch) < 1:
            axes = " or ".join(str(count) for count in accepted[self.name])
            raise ValueError(f"patch is {self.patch}; {self.name} accepts {axes} positive sizes")

    def __call__(
        self,
        image: np.ndarray,  # [*S] float32
        label: np.ndarray | None,  # [*S] uint8
        generator: torch.Generator,
    ) -> Pair:
        """Return image [*P] and label [*P] (None if None came in); the inputs are not changed."""
        if image.ndim != len(self.patch):
            raise ValueError(
                f"image has shape {image.shape}; a patch {self.patch} needs {len(self.patch)} axes"
            )
        if self.name == "crop":
            return random_crop(image, label, self.patch, generator)
        if self.name == "crop_rotate_flip":
            return random_crop(*random_rotate_flip(image, label, generator), self.patch, generator)
        if _integer(2, generator):
            image, label = random_rotate_flip(image, label, generator)
        elif _integer(2, generator):
            image, label = random_rotate(image, label, generator)
        return resize(image, label, self.patch)


def random_crop(
    image: np.ndarray,  # [*S] float32
    label: np.ndarray | None,  # [*S] uint8
    patch: tuple[int, ...],
    generator: torch.Generator,
) -> Pair:
    """Crop a patch at a uniform corner, after padding an image that is smaller with zeros on both sides."""
    missing = [max(size - available, 0) for size, available in zip(patch, image.shape, strict=True)]
    padding = [(count // 2, count - count // 2) for count in missing]
    corner = [
        _integer(available + count - size + 1, generator)
        for size, available, count in zip(patch, image.shape, missing, strict=True)
    ]
    box = tuple(slice(start, start + size) for start, size in zip(corner, patch, strict=True))

    def crop(array: np.ndarray) -> np.ndarray:
        return (np.pad(array, padding) if any(missing) else array)[box]

    return crop(image), None if label is None else crop(label)


def random_rotate_flip(
    image: np.ndarray,  # [H, W, ...] float32
    label: np.ndarray | None,  # [H, W, ...] uint8
    generator: torch.Generator,
) -> Pair:
    """Rotate by a random multiple of 90 degrees in the plane of the first two axes, then flip one of them."""
    quarters, axis = _integer(4, generator), _integer(2, generator)

    def rotate_flip(array: np.ndarray) -> np.ndarray:
        return np.flip(np.rot90(array, quarters), axis)

    return rotate_flip(image), None if label is None else rotate_flip(label)


def random_rotate(
    image: np.ndarray,  # [H, W] float32
    label: np.ndarray | None,  # [H, W] uint8
    generator: torch.Generator,
) -> Pair:
    """Rotate about the centre by an angle uniform in ±20°, image linear, label nearest, zeros outside."""
    angle = math.radians(ROTATION_DEGREES) * (2 * torch.rand((), generator=generator).item() - 1)
    height, width = image.shape
    cosine, sine = math.cos(angle), math.sin(angle)
    # grid_sample's coordinates run from -1 to 1 along each side, so the rotation must know the sides' ratio.
    matrix = torch.tensor([[[cosine, -sine * height / width, 0.0], [sine * width / height, cosine, 0.0]]])
    grid = F.affine_grid(matrix, [1, 1, height, width], align_corners=False)

    def rotate(array: np.ndarray, mode: str) -> np.ndarray:
        return F.grid_sample(_planes(array).float(), grid, mode, align_corners=False)[0, 0].numpy()

    return rotate(image, "bilinear"), None if label is None else rotate(label, "nearest").astype(np.uint8)


def resize(
    image: np.ndarray,  # [H, W] float32
    label: np.ndarray | None,  # [H, W] uint8
    shape: tuple[int, ...],
) -> Pair:
    """Resize a slice to `shape`, image linear, label nearest."""
    if image.shape == shape:
        return image, label
    resized = F.interpolate(_planes(image), shape, mode="bilinear", align_corners=False)[0, 0].numpy()
    if label is None:
        return resized, None
    return resized, F.interpolate(_planes(label), shape, mode="nearest-exact")[0, 0].numpy()


def _planes(array: np.ndarray) -> torch.Tensor:
    """[H, W] -> [1, 1, H, W]"""
    return torch.from_numpy(np.ascontiguousarray(array))[None, None]


def _integer(count: int, generator: torch.Generator) -> int:
    """Draw a whole number from 0 to count - 1."""
    return int(torch.randint(count, (), generator=generator))
