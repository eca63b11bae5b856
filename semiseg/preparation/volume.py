"""Scans with their place in space: reading NIfTI, NRRD and DICOM, bringing a label onto its image's grid."""

import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import nibabel
import nrrd
import numpy as np
import pydicom
from nibabel.openers import Opener
from nibabel.orientations import (
    aff2axcodes,
    apply_orientation,
    axcodes2ornt,
    inv_ornt_aff,
    io_orientation,
    ornt_transform,
)
from scipy import ndimage

from semiseg.data.preprocessing import Preprocessing
from semiseg.engine.atomic import replace_atomically

# NRRD's names of the space its directions are given in, and the signs that lead from there to NIfTI's space.
NRRD_SPACES = {
    "left-posterior-superior": (-1, -1, 1),
    "left-anterior-superior": (-1, 1, 1),
    "right-anterior-superior": (1, 1, 1),
}
SAME_SPACING = 0.01  # relative
SAME_DIRECTION = 0.02  # cosines
UNREADABLE = (OSError, EOFError, ValueError, KeyError, zlib.error)


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

    def turned(self, orientation: str | None) -> "Volume":
        """Permute and reverse axes until they lead to `orientation` (None: as they are), without interpolation."""
        if orientation is None:
            return self
        turn = ornt_transform(io_orientation(self.affine), axcodes2ornt(orientation))
        return replace(
            self,
            values=apply_orientation(self.values, turn),
            affine=self.affine @ inv_ornt_aff(turn, self.values.shape),
        )

    def prepared(self, preprocessing: Preprocessing) -> np.ndarray:  # [*S] float32
        """The image as a dataset's networks see it: at its spacing, intensities scaled; the axes stay.

        Raises ValueError, naming the file, where the scan is the same everywhere.
        """
        spacing, image = preprocessing.spacing, self
        if spacing is not None and not self.has_spacing(spacing):
            clipped = preprocessing.clipped(self.values.astype(np.float32))
            image = replace(self, values=clipped).resampled(spacing)
        try:
            return preprocessing.scaled(image.values)
        except ValueError as error:
            raise ValueError(f"{self.path}: {error}") from None

    def resampled(self, spacing: tuple[float, ...]) -> "Volume":
        """Interpolate linearly at voxels of another size in mm, from the same corner on; values float32."""
        values = resample(self.values.astype(np.float32), self.spacing, spacing)
        steps = np.divide(spacing, self.spacing)
        # The centre of the first voxel moves when its corner stays.
        move = np.eye(4)
        move[:3, :3] = np.diag(steps)
        move[:3, 3] = 0.5 * steps - 0.5
        return replace(self, values=values, affine=self.affine @ move)

    def has_spacing(self, spacing: tuple[float, ...]) -> bool:
        """Whether voxels have this size in mm, to one per cent."""
        return np.allclose(self.spacing, spacing, rtol=SAME_SPACING, atol=0)


def on_grid_of(image: Volume, label: Volume) -> Volume:
    """Turn a label along the axes of its image, as the two affines say.

    Raises ValueError if the shapes, spacings or directions then differ. Origins may differ: labels are often
    stored without one.
    """
    turned = label.turned(image.orientation)
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
                f"{label.path}: the label has {what} {ours} and its image {image.path} {theirs}; "
                f"expected the same along the image's axes {image.orientation}"
            )
    return turned


def origins_differ(image: Volume, label: Volume) -> bool:
    """Whether the affines of two volumes on one grid lie more than half a voxel apart."""
    distance = np.linalg.norm(image.affine[:3, 3] - label.affine[:3, 3])
    return bool(distance > 0.5 * min(image.spacing))


def read_volume(path: Path) -> Volume:
    """Read a NIfTI file (.nii, .nii.gz), a NRRD file (.nrrd), or a folder with one DICOM series.

    Raises FileNotFoundError if it is missing, ValueError if it is none of these or cannot be read.
    """
    if path.is_dir():
        return read_dicom_series(path)
    return read_nifti(path) if _is_nifti(path) else read_nrrd(path)


def check_header(path: Path) -> None:
    """Raise as `read_volume` would for a NIfTI or NRRD file, as far as its header tells."""
    if _is_nifti(path):
        with _reading(path, "NIfTI"):
            file = nibabel.load(path)
            shape, affine = _space(file.shape), file.affine  # type: ignore[attr-defined]
    else:
        with _reading(path, "NRRD"):
            header = nrrd.read_header(str(path))
            shape, affine = tuple(header["sizes"]), _nrrd_affine(header)
    _check_grid(path, shape, affine)


def read_nifti(path: Path) -> Volume:
    """Read a NIfTI file of three axes; further ones of length one are dropped.

    Raises FileNotFoundError if it is missing, ValueError if it cannot be read or has other axes.
    """
    with _reading(path, "NIfTI"):
        file = nibabel.load(path)
        values = np.asanyarray(file.dataobj)  # type: ignore[attr-defined]
    return _volume(path, values.reshape(_space(values.shape)), file.affine)  # type: ignore[attr-defined]


def write_nifti(
    path: Path,  # .nii or .nii.gz
    values: np.ndarray,  # [x, y, z], or [x, y, z, C]
    affine: np.ndarray,  # [4, 4]
) -> None:
    """Write a NIfTI file; it appears whole or not at all."""
    image = nibabel.Nifti1Image(values, affine)
    image.header.set_xyzt_units("mm")
    image.set_sform(affine, code="scanner")
    image.set_qform(affine, code="scanner")
    with replace_atomically(path) as temporary, Opener(str(temporary), "wb") as stream:
        image.to_stream(stream)  # type: ignore[arg-type]  # it does what a file does


def read_nrrd(path: Path) -> Volume:
    """Read a NRRD file of three axes; without a space it counts as LPS, without directions as 1 mm.

    Raises FileNotFoundError if it is missing, ValueError if it cannot be read or has other axes.
    """
    with _reading(path, "NRRD"):
        values, header = nrrd.read(str(path))
        affine = _nrrd_affine(header)
    return _volume(path, values, affine)


def read_dicom_series(folder: Path) -> Volume:
    """Read the one DICOM series below a folder, its values rescaled (CT: to Hounsfield units), float32.

    Raises ValueError if a file cannot be read, there is not exactly one series, its slices are not parallel,
    not one behind the other or not equally far apart.
    """
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() == ".dcm")
    if len(paths) < 2:
        raise ValueError(f"{folder}: holds {len(paths)} DICOM files (*.dcm); expected a series of slices")
    slices = [_read_slice(path) for path in paths]
    series = {slice.SeriesInstanceUID for slice in slices}
    if len(series) > 1:
        raise ValueError(f"{folder}: holds {len(series)} DICOM series; expected one")
    first = slices[0]
    for path, slice in zip(paths, slices, strict=True):
        for name in ("Rows", "Columns", "PixelSpacing", "ImageOrientationPatient"):
            if not np.allclose(slice[name].value, first[name].value, atol=1e-4):
                raise ValueError(
                    f"{path}: {name} is {slice[name].value}; another slice has {first[name].value}"
                )
    along_x, along_y = np.reshape(first.ImageOrientationPatient, (2, 3)).astype(float)
    normal = np.cross(along_x, along_y)
    slices.sort(key=lambda slice: normal @ np.asarray(slice.ImagePositionPatient, dtype=float))
    positions = np.array([slice.ImagePositionPatient for slice in slices], dtype=float)
    step = (positions[-1] - positions[0]) / (len(slices) - 1)
    gaps = np.diff(positions @ normal)
    if gaps.max() - gaps.min() > 0.1 * np.median(gaps):
        raise ValueError(
            f"{folder}: slices lie {gaps.min():.2f} to {gaps.max():.2f} mm apart; "
            "expected equal gaps: a slice is missing or there twice"
        )
    if np.linalg.norm(np.cross(step, normal)) > SAME_DIRECTION * np.linalg.norm(step):
        raise ValueError(f"{folder}: slices are shifted against each other (a tilted gantry); expected none")
    values = np.empty((first.Columns, first.Rows, len(slices)), np.float32)
    for index, slice in enumerate(slices):
        values[:, :, index] = _pixels(folder, slice).T
    affine = np.eye(4)
    row_spacing, column_spacing = (float(size) for size in first.PixelSpacing)
    affine[:3] = np.stack([along_x * column_spacing, along_y * row_spacing, step, positions[0]], axis=1)
    return _volume(folder, values, np.diag([-1, -1, 1, 1]) @ affine)


def _nrrd_affine(header: Mapping[str, Any]) -> np.ndarray:
    affine = np.eye(4)
    if "space directions" in header:
        affine[:3, :3] = np.asarray(header["space directions"], dtype=float).T
        affine[:3, 3] = header.get("space origin", np.zeros(3))
    elif "spacings" in header:
        affine[:3, :3] = np.diag(header["spacings"])
    signs = NRRD_SPACES.get(header.get("space", ""), NRRD_SPACES["left-posterior-superior"])
    return np.diag([*signs, 1]) @ affine


def _read_slice(path: Path) -> pydicom.Dataset:
    try:
        slice = pydicom.dcmread(path)
    except (*UNREADABLE, pydicom.errors.InvalidDicomError) as error:
        raise ValueError(f"{path}: cannot be read as DICOM ({_line(error)})") from error
    for name in ("SeriesInstanceUID", "ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing",
                 "Rows", "Columns", "PixelData"):  # fmt: skip
        if name not in slice:
            raise ValueError(f"{path}: has no {name}; expected a DICOM image with its position")
    return slice


def _pixels(folder: Path, slice: pydicom.Dataset) -> np.ndarray:
    try:
        pixels = slice.pixel_array
    except (*UNREADABLE, AttributeError, RuntimeError) as error:
        raise ValueError(f"{folder}: the pixels of slice {slice.SOPInstanceUID} cannot be decoded "
                         f"({_line(error)})") from error  # fmt: skip
    scale, shift = slice.get("RescaleSlope", 1), slice.get("RescaleIntercept", 0)
    return pixels.astype(np.float32) * np.float32(scale) + np.float32(shift)


def _space(shape: tuple[int, ...]) -> tuple[int, ...]:
    """A shape without the axes of length one that some programs write behind the three of space."""
    return shape[:3] if all(side == 1 for side in shape[3:]) else shape


def _is_nifti(path: Path) -> bool:
    return path.name.endswith((".nii", ".nii.gz"))


@contextmanager
def _reading(path: Path, what: str) -> Iterator[None]:
    """Turn whatever a library raises for a file it cannot read into one ValueError."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: missing; expected a {what} file")
    try:
        yield
    except (*UNREADABLE, TypeError, nrrd.NRRDError, nibabel.filebasedimages.ImageFileError) as error:
        raise ValueError(f"{path}: cannot be read as {what} ({_line(error)})") from error


def _volume(path: Path, values: np.ndarray, affine: np.ndarray) -> Volume:
    _check_grid(path, values.shape, affine)
    if values.dtype.kind not in "biuf":
        raise ValueError(f"{path}: holds values of type {values.dtype}; expected one number a voxel")
    return Volume(path, values, affine)


def _check_grid(path: Path, shape: tuple[int, ...], affine: np.ndarray) -> None:
    if len(shape) != 3 or 0 in shape:
        raise ValueError(f"{path}: has shape {shape}; expected three axes, none of them empty")
    directions = affine[:3, :3]
    if not np.isfinite(affine).all() or abs(np.linalg.det(directions)) < 1e-9:
        raise ValueError(f"{path}: its header gives no direction for some axis; expected a spacing for each")


def _directions(volume: Volume) -> np.ndarray:
    return volume.affine[:3, :3] / volume.spacing


def _rounded(numbers: Iterable[float]) -> tuple[float, ...]:
    return tuple(round(float(number), 4) for number in numbers)


def _line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def resample(
    image: np.ndarray,  # [x, y, z] float32
    spacing: tuple[float, ...],  # mm
    wanted: tuple[float, ...],  # mm
) -> np.ndarray:
    """Interpolate linearly at voxels of another size; the first corner of the volume stays where it is."""
    steps = np.divide(wanted, spacing)
    shape = tuple(max(1, round(size / step)) for size, step in zip(image.shape, steps, strict=True))
    return ndimage.affine_transform(
        image, steps, offset=0.5 * steps - 0.5, output_shape=shape, order=1, mode="nearest"
    )


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
