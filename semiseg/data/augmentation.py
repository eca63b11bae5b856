"""Random crops, rotations and flips of tensors, on the device that holds them.

All randomness comes from the generator the caller gives. What happens to a case is drawn first, from its
shape alone, and then done, so that the processor never waits for a GPU.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from semiseg.data.compact_image import CompactImage
from semiseg.data.disk_image import DiskImage

Stored = Tensor | CompactImage | DiskImage
ROTATION_DEGREES = 20.0
# Axes that turning by 0, 90, 180 and 270 degrees reverses, where by 90 and 270 it also swaps them, first.
REVERSED_BY_QUARTERS: tuple[set[int], ...] = (set(), {0}, {0, 1}, {1})


class Transformation(Protocol):
    """What was drawn for one case."""

    def __call__(
        self,
        case: Sequence[Stored],  # image [M, *S] float32, perhaps label [1, *S] uint8
        patch: Sequence[Tensor],  # [M, *P], [1, *P], of the same types
    ) -> None:
        """Write the transformed case into the patch; images are interpolated, labels never mixed."""
        ...


@dataclass(frozen=True)
class Augmentation:
    """What happens to a training case before it enters a batch.

    crop_rotate_flip: rot90 + flip in plane, then a random crop (left atrium, phantom): always a mirror image.
    crop_dihedral: one of a square's eight symmetries in plane, then a random crop (own data): also the scan as it is.
    rotate_flip_resize: with probability 1/2 rot90 + flip, else with probability 1/2 a rotation by up to 20
    degrees; then a resize to the patch (ACDC slices).
    crop: a random crop only (pancreas).
    Crops have uniform corners; an image that is smaller than the patch is padded with zeros on both sides.
    """

    name: str
    patch: tuple[int, ...]  # shape of what comes out

    def __post_init__(self) -> None:
        accepted = {
            "crop_rotate_flip": (2, 3),
            "crop_dihedral": (2, 3),
            "rotate_flip_resize": (2,),
            "crop": (2, 3),
        }
        if self.name not in accepted:
            raise ValueError(f"dataset.augmentation is {self.name!r}, accepted are {', '.join(sorted(accepted))}")
        if len(self.patch) not in accepted[self.name] or min(self.patch) < 1:
            axes = " or ".join(str(count) for count in accepted[self.name])
            raise ValueError(f"patch is {self.patch}, accepted with {self.name} are {axes} positive sizes")

    def draw(
        self,
        shape: Sequence[int],  # S
        generator: torch.Generator,
    ) -> Transformation:
        """Draw what happens to a case of this shape. Raises ValueError where the patch has other axes."""
        if len(shape) != len(self.patch):
            raise ValueError(
                f"shape is {tuple(shape)}, accepted with the patch {self.patch} are {len(self.patch)} axes"
            )
        if self.name == "crop":
            return Crop(UNTURNED, _random_corner(shape, self.patch, generator))
        if self.name in ("crop_rotate_flip", "crop_dihedral"):
            turn = (Turn.draw if self.name == "crop_rotate_flip" else Turn.draw_dihedral)(generator)
            return Crop(turn, _random_corner(turn.shape(shape), self.patch, generator))
        if _integer(2, generator):
            return Resize(Turn.draw(generator))
        if _integer(2, generator):
            return Resize(Rotation.draw(generator))
        return Resize(UNTURNED)


@dataclass(frozen=True)
class Turn:
    """A turn by a multiple of 90 degrees in the plane of the first two axes of S, and a flip of one of them."""

    swapped: bool  # the two axes, before any is reversed
    reversed_axes: tuple[int, ...]  # of S

    @classmethod
    def draw(cls, generator: torch.Generator) -> "Turn":
        """Draw how far to turn and which axis to flip then: always a mirror image."""
        quarters, flipped = _integer(4, generator), _integer(2, generator)
        return cls(quarters % 2 == 1, tuple(REVERSED_BY_QUARTERS[quarters] ^ {flipped}))

    @classmethod
    def draw_dihedral(cls, generator: torch.Generator) -> "Turn":
        """Draw whether to swap the axes and to reverse each: any of a square's eight symmetries, equally often."""
        swapped = bool(_integer(2, generator))
        return cls(swapped, tuple(axis for axis in range(2) if _integer(2, generator)))

    def shape(
        self,
        shape: Sequence[int],  # S
    ) -> tuple[int, ...]:
        """Shape of what comes out."""
        return (shape[1], shape[0], *shape[2:]) if self.swapped else tuple(shape)

    def swap(
        self,
        values: Stored,  # [M, *S]
    ) -> Stored:
        """The first half: a view."""
        return values.transpose(1, 2) if self.swapped else values

    def reverse(
        self,
        values: Stored,  # [M, *S]
    ) -> Stored:
        """The second half: a copy where anything is reversed."""
        return values.flip(tuple(1 + axis for axis in self.reversed_axes)) if self.reversed_axes else values

    def __call__(
        self,
        case: Sequence[Stored],  # [M, *S] each
    ) -> list[Stored]:
        return [self.reverse(self.swap(values)) for values in case]


UNTURNED = Turn(swapped=False, reversed_axes=())


@dataclass(frozen=True)
class Rotation:
    """A rotation about the centre, images linear, labels nearest, zeros outside."""

    angle: float  # radians

    @classmethod
    def draw(cls, generator: torch.Generator) -> "Rotation":
        """Draw an angle uniform in ±20°."""
        fraction = 2 * torch.rand((), generator=generator).item() - 1
        return cls(math.radians(ROTATION_DEGREES) * fraction)

    def __call__(
        self,
        case: Sequence[Stored],  # [M, H, W] each
    ) -> list[Tensor]:
        (_, height, width), device = case[0].shape, case[0].device
        cosine, sine = math.cos(self.angle), math.sin(self.angle)
        # grid_sample's coordinates run from -1 to 1 along each side: the rotation must know the sides' ratio.
        matrix = torch.tensor([[[cosine, -sine * height / width, 0.0], [sine * width / height, cosine, 0.0]]])
        grid = F.affine_grid(matrix.to(device, non_blocking=True), [1, 1, height, width], align_corners=False)
        return [
            F.grid_sample(
                values[None].float(),
                grid,
                "bilinear" if values.is_floating_point() else "nearest",
                align_corners=False,
            )[0].to(values.dtype)
            for values in map(expanded, case)
        ]


@dataclass(frozen=True)
class Crop:
    """A turn, then a crop, with zeros where it reaches beyond the image."""

    turn: Turn
    corner: tuple[int, ...]  # in the turned image, negative in the padding

    def __call__(
        self,
        case: Sequence[Stored],  # [M, *S] each
        patch: Sequence[Tensor],  # [M, *P] each
    ) -> None:
        sides, sizes = self.turn.shape(case[0].shape[1:]), patch[0].shape[1:]
        inside, box = [slice(None)], [slice(None)]
        for axis, (first, size, side) in enumerate(zip(self.corner, sizes, sides, strict=True)):
            start, stop = max(first, 0), min(first + size, side)
            inside.append(slice(start - first, stop - first))
            # Only the patch is copied: what is to be reversed is cropped from the other end.
            is_reversed = axis in self.turn.reversed_axes
            box.append(slice(side - stop, side - start) if is_reversed else slice(start, stop))
        for values, out in zip(case, patch, strict=True):
            cropped = self.turn.swap(values)[tuple(box)]
            if cropped.shape != out.shape:
                out.zero_()
            out[tuple(inside)].copy_(expanded(self.turn.reverse(cropped)))


@dataclass(frozen=True)
class Resize:
    """A turn or a rotation, then a resize to the patch."""

    turn: Turn | Rotation

    def __call__(
        self,
        case: Sequence[Stored],  # [M, H, W] each
        patch: Sequence[Tensor],  # [M, *P] each
    ) -> None:
        for values, out in zip(self.turn(case), patch, strict=True):
            out.copy_(resize(expanded(values), out.shape[1:]))


def resize(
    values: Tensor,  # [M, H, W] float32, an image, or uint8, a label
    shape: Sequence[int],  # of two axes
) -> Tensor:  # [M, *shape]
    """Resize a slice, an image linear, a label nearest; one of that shape is returned itself."""
    if values.shape[1:] == tuple(shape):
        return values
    planes = values.contiguous()[None]
    if values.is_floating_point():
        return F.interpolate(planes, tuple(shape), mode="bilinear", align_corners=False)[0]
    return F.interpolate(planes, tuple(shape), mode="nearest-exact")[0]


def expanded(values: Stored) -> Tensor:
    """A tensor as it is, what is stored in another form as the image itself."""
    return values if isinstance(values, Tensor) else values.expand()


def _random_corner(shape: Sequence[int], patch: Sequence[int], generator: torch.Generator) -> tuple[int, ...]:
    """Draw where a patch begins: at a negative place in the padding before an image that is smaller."""
    corner = []
    for side, size in zip(shape, patch, strict=True):
        missing = max(size - side, 0)
        corner.append(_integer(side + missing - size + 1, generator) - missing // 2)
    return tuple(corner)


def _integer(count: int, generator: torch.Generator) -> int:
    """Draw a whole number from 0 to count - 1."""
    return int(torch.randint(count, (), generator=generator))
