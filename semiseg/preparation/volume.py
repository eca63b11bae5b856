"""Scans with their place in space: turning, resampling, bringing a label onto its image's grid."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from nibabel.affines import from_matvec
from nibabel.orientations import (
    aff2axcodes,
    apply_orientation,
    axcodes2ornt,
    inv_ornt_aff,
    io_orientation,
    ornt_transform,
)
from scipy import ndimage

from semiseg.data.preprocessing import Intensity, Preprocessing
from semiseg.memory import machine_memory

SAME_SPACING = 0.01  # relative
SAME_DIRECTION = 0.02  # cosines
SLICE_SPACING = 1.2  # times that of the other axes: from there on an axis counts as that of the slices
# By where the axis of the slices leads: from slice to slice, then down and to the right as radiology shows that plane.
PLANES = {"S": "SPL", "I": "SPL", "A": "PIL", "P": "PIL", "L": "LIP", "R": "LIP"}
FLAT = 1e-6  # determinant of unit directions; below, they are not three
BYTES_PER_VOXEL = 8  # of a resampled image: interpolated and scaled, float32 each


@dataclass(frozen=True)
class Volume:
    """Voxels and the affine that places them."""

    path: Path
    values: np.ndarray  # [x, y, z], the axes as the file holds them
    affine: np.ndarray  # [4, 4], voxel index to mm towards right, anterior and superior

    @property
    def spacing(self) -> tuple[float, ...]:
        """Size of a voxel along each axis in mm."""
        return tuple(float(size) for size in np.linalg.norm(self.affine[:3, :3], axis=0))

    @property
    def orientation(self) -> str:
        """Where each axis leads: LPS if x leads to the left, y to posterior and z to superior."""
        return "".join(aff2axcodes(self.affine))

    @property
    def slice_orientation(self) -> str:
        """Orientation whose first axis leads from slice to slice: along the coarsest axis, without one to superior."""
        return slice_orientation(self.orientation, self.spacing)

    def turned(self, orientation: str | None) -> "Volume":
        """Permute and reverse axes until they lead to `orientation` (None: as they are), without interpolation."""
        if orientation is None:
            return self
        return self._turned(ornt_transform(io_orientation(self.affine), axcodes2ornt(orientation)))

    def turned_along(self, other: "Volume") -> "Volume":
        """Permute and reverse axes until each leads where that of another volume leads, without interpolation.

        The two are compared with each other: axes that lie half-way between two of the body may be called by either
        name, and a difference of rounding in the headers decides by which.
        """
        return self._turned(io_orientation(from_matvec(np.linalg.solve(_directions(other), _directions(self)))))

    def _turned(
        self,
        turn: np.ndarray,  # [3, 2] as nibabel has it: for each axis where it goes and whether it is reversed
    ) -> "Volume":
        return replace(
            self,
            values=apply_orientation(self.values, turn),
            affine=self.affine @ inv_ornt_aff(turn, self.values.shape),
        )

    def prepared(
        self,
        spacing: tuple[float, ...],  # mm
        intensity: Intensity,
    ) -> np.ndarray:  # [*S] float32
        """One channel as a dataset's networks see it: at its spacing, intensities scaled; the axes stay.

        Raises ValueError, naming the file, where the scan is the same everywhere or too large to be resampled.
        """
        image = self
        if not self.has_spacing(spacing):
            clipped = intensity.clipped(self.values.astype(np.float32))
            image = replace(self, values=clipped).resampled(spacing)
        try:
            return intensity.scaled(image.values)
        except ValueError as error:
            raise ValueError(f"{self.path}: {error}") from None

    def resampled(self, spacing: tuple[float, ...]) -> "Volume":
        """Interpolate linearly at voxels of another size in mm, from the same corner on; values float32.

        Raises ValueError, naming the file, where the machine has too little memory for them.
        """
        self.check_memory(spacing)
        values = resample(self.values.astype(np.float32), self.spacing, spacing)
        steps = np.divide(spacing, self.spacing)
        # The centre of the first voxel moves when its corner stays.
        move = np.eye(4)
        move[:3, :3] = np.diag(steps)
        move[:3, 3] = 0.5 * steps - 0.5
        return replace(self, values=values, affine=self.affine @ move)

    def check_memory(self, spacing: tuple[float, ...]) -> None:
        """Raise ValueError, naming the file, where voxels of this size in mm take more than the machine has."""
        shape = resampled_shape(self.values.shape, self.spacing, spacing)
        needed, there = math.prod(shape) * BYTES_PER_VOXEL, machine_memory()
        if needed > there:
            raise ValueError(
                f"{self.path}: {sides(self.values.shape)} voxels of {sides(self.spacing)} mm are {sides(shape)} of "
                f"{sides(spacing)} mm, which take {needed / 2**30:.3g} GB, "
                f"accepted are up to the {there / 2**30:.3g} GB of this machine"
            )

    def has_spacing(self, spacing: tuple[float, ...]) -> bool:
        """Whether voxels have this size in mm, to one per cent."""
        return np.allclose(self.spacing, spacing, rtol=SAME_SPACING, atol=0)


def checked_volume(
    path: Path,
    values: np.ndarray,
    affine: np.ndarray,  # [4, 4]
) -> Volume:
    """A volume as its file holds it.

    Raises ValueError for other axes than three, empty or without a direction, and voxels of more than one number.
    """
    if values.ndim != 3 or 0 in values.shape:
        raise ValueError(f"{path}: has shape {values.shape}; expected three axes, none of them empty")
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    if not (np.isfinite(affine).all() and spacing.all() and abs(np.linalg.det(affine[:3, :3] / spacing)) > FLAT):
        raise ValueError(f"{path}: its header gives no direction for some axis; expected a spacing for each")
    if values.dtype.kind not in "biuf":
        raise ValueError(f"{path}: holds values of type {values.dtype}; expected one number a voxel")
    return Volume(path, values, affine)


def prepared_channels(
    channels: Sequence[Volume],  # on one grid
    preprocessing: Preprocessing,
) -> np.ndarray:  # [M, *S] float32
    """A scan as a dataset's networks see it. Raises as `Volume.prepared` does."""
    spacing = preprocessing.spacing_of(channels[0].spacing)
    pairs = zip(channels, preprocessing.channels, strict=True)
    prepared = [channel.prepared(spacing, intensity) for channel, intensity in pairs]
    return np.stack(prepared) if len(prepared) > 1 else prepared[0][None]  # no copy of one alone


def slice_orientation(
    orientation: str,
    spacing: Sequence[float],  # mm along each of its axes
) -> str:
    """`Volume.slice_orientation` of a volume whose axes lead to `orientation`."""
    *_, middle, coarsest = np.argsort(spacing)
    has_slices = spacing[coarsest] > SLICE_SPACING * spacing[middle]
    return PLANES[orientation[coarsest] if has_slices else "S"]


def sides(numbers: Iterable[float]) -> str:
    """Lengths along the axes, as messages have them."""
    return " × ".join(f"{number:.4g}" for number in numbers)


def on_grid_of(
    image: Volume,
    other: Volume,
    kind: str = "label",  # what the other is of the image, in an error
) -> Volume:
    """Turn a label along the axes of its image, as the two affines say, or one channel along those of another.

    Raises ValueError if the shapes, spacings or directions then differ. Origins may differ: labels are often
    stored without one.
    """
    turned = other.turned_along(image)
    directions, expected = _directions(turned), _directions(image)
    for what, ours, theirs, same in (
        ("shape", turned.values.shape, image.values.shape, turned.values.shape == image.values.shape),
        ("spacing", _rounded(turned.spacing), _rounded(image.spacing),
         np.allclose(turned.spacing, image.spacing, rtol=SAME_SPACING, atol=0)),
        ("directions", _rounded(directions.ravel()), _rounded(expected.ravel()),
         np.allclose(directions, expected, rtol=0, atol=SAME_DIRECTION)),
    ):  # fmt: skip
        if not same:
            raise ValueError(
                f"{other.path}: the {kind} has {what} {ours} and its image {image.path} {theirs}; "
                f"expected the same along the image's axes {image.orientation}"
            )
    return turned


def origins_differ(image: Volume, other: Volume) -> bool:
    """Whether the affines of two volumes on one grid lie more than half a voxel apart."""
    distance = np.linalg.norm(image.affine[:3, 3] - other.affine[:3, 3])
    return bool(distance > 0.5 * min(image.spacing))


def _directions(volume: Volume) -> np.ndarray:
    return volume.affine[:3, :3] / volume.spacing


def _rounded(numbers: Iterable[float]) -> tuple[float, ...]:
    return tuple(round(float(number), 4) for number in numbers)


def resample(
    image: np.ndarray,  # [x, y, z] float32
    spacing: tuple[float, ...],  # mm
    wanted: tuple[float, ...],  # mm
) -> np.ndarray:
    """Interpolate linearly at voxels of another size; the first corner of the volume stays where it is."""
    steps = np.divide(wanted, spacing)
    shape = resampled_shape(image.shape, spacing, wanted)
    return ndimage.affine_transform(
        image, steps, offset=0.5 * steps - 0.5, output_shape=shape, order=1, mode="nearest"
    )


def resampled_shape(
    shape: Sequence[int],
    spacing: Sequence[float],  # mm
    wanted: Sequence[float],  # mm
) -> tuple[int, ...]:
    """Sides of a volume at voxels of another size."""
    steps = np.divide(wanted, spacing)
    return tuple(max(1, round(size / step)) for size, step in zip(shape, steps, strict=True))


def resample_label(
    label: np.ndarray,  # [x, y, z] uint8, classes
    spacing: tuple[float, ...],  # mm
    wanted: tuple[float, ...],  # mm
) -> np.ndarray:
    """The class whose indicator, interpolated as an image is, is largest; the higher of two that are equal."""
    first, *others = np.unique(label)
    most = resample((label == first).astype(np.float32), spacing, wanted)
    resampled = np.full(most.shape, first, np.uint8)
    for number in others:
        share = resample((label == number).astype(np.float32), spacing, wanted)
        more = share >= most
        resampled[more], most[more] = number, share[more]
    return resampled
