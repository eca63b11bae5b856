"""Files of scans, NIfTI, NRRD and DICOM, read with their place in space; masks written as NIfTI."""

import gzip
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import BufferedIOBase
from pathlib import Path
from typing import Any

import nibabel
import nrrd
import numpy as np
import pydicom
from nibabel.openers import Opener
from pydicom.misc import is_dicom

from semiseg.atomic import replace_atomically
from semiseg.errors import first_line
from semiseg.preparation.volume import SAME_DIRECTION, Volume

# NRRD's names of the space its directions are given in, and the signs that lead from there to NIfTI's space.
NRRD_SPACES = {
    "left-posterior-superior": (-1, -1, 1),
    "left-anterior-superior": (-1, 1, 1),
    "right-anterior-superior": (1, 1, 1),
}
NRRD_SPACES |= {"".join(word[0] for word in name.split("-")): signs for name, signs in NRRD_SPACES.items()}
NIFTI_ENDINGS = (".nii.gz", ".nii")  # in small or large letters, as all endings
SCAN_ENDINGS = (*NIFTI_ENDINGS, ".nrrd")
# Elements of a DICOM file and how many numbers each has.
SAME_IN_A_SERIES = {"Rows": 1, "Columns": 1, "PixelSpacing": 2, "ImageOrientationPatient": 6}
DICOM_NUMBERS = {**SAME_IN_A_SERIES, "ImagePositionPatient": 3, "RescaleSlope": 1, "RescaleIntercept": 1}
RESCALING = {"RescaleSlope": 1.0, "RescaleIntercept": 0.0}  # where they are missing
ONE_GREY_IMAGE = {"SamplesPerPixel": 1, "NumberOfFrames": 1, "PhotometricInterpretation": "MONOCHROME2"}
DICOM_INDEX = "DICOMDIR"  # lists the files beside it
FLAT = 1e-6  # determinant of unit directions; below, they are not three
HEADER, BLOCK = 540, 2**20  # bytes: the longest header of NIfTI, and what is read at once


def has_ending(path: Path, endings: tuple[str, ...]) -> bool:
    """Whether a file's name ends in one of these, in small or large letters."""
    return path.name.lower().endswith(endings)


def is_hidden(path: Path) -> bool:
    """Whether a name begins with a dot, such as of the files that macOS puts beside each one on other file systems."""
    return path.name.startswith(".")


def dicom_files(folder: Path) -> list[Path]:
    """The DICOM files anywhere below a folder, in the order of their names: `*.dcm`, and others by their content."""
    return sorted(path for path in folder.rglob("*") if path.is_file() and not is_hidden(path) and _is_dicom(path))


def _is_dicom(path: Path) -> bool:
    if has_ending(path, (".dcm",)):
        return True
    return path.name != DICOM_INDEX and not has_ending(path, SCAN_ENDINGS) and is_dicom(path)


def scan_files(folder: Path) -> list[Path]:
    """A folder's NIfTI and NRRD files."""
    return [path for path in folder.iterdir() if has_ending(path, SCAN_ENDINGS) and not is_hidden(path)]


def scans_in(folder: Path) -> list[Path]:
    """A folder's NIfTI and NRRD files and, each a scan, its folders with DICOM files below, in the order of their names.

    Raises ValueError where a DICOM file lies in the folder itself.
    """
    series = {folder / path.relative_to(folder).parts[0] for path in dicom_files(folder)}
    for path in sorted(series):
        if path.is_file():
            raise ValueError(f"{path}: lies in the folder of all scans; expected a folder for every DICOM series")
    return sorted([*scan_files(folder), *series])


def stem(path: Path) -> str:
    """A scan's name without its ending."""
    path = path.absolute()
    return next((path.name[: -len(end)] for end in SCAN_ENDINGS if has_ending(path, (end,))), path.name)


def read_volume(path: Path) -> Volume:
    """Read a NIfTI file (.nii, .nii.gz), a NRRD file (.nrrd), or a folder with one DICOM series.

    Raises FileNotFoundError if it is missing, ValueError if it is none of these or cannot be read.
    """
    if path.is_dir():
        return read_dicom_series(path)
    return read_nifti(path) if has_ending(path, NIFTI_ENDINGS) else read_nrrd(path)


def read_header(path: Path) -> Volume:
    """Where a NIfTI or NRRD file or a DICOM series places its voxels; all of them are 0 here, and take no memory.

    Raises as `read_volume` does, as far as the header tells.
    """
    if path.is_dir():
        series = _series(path)
        values, affine = np.broadcast_to(np.uint8(0), series.shape), series.affine
    elif has_ending(path, NIFTI_ENDINGS):
        with _reading(path, "NIfTI"), _nifti(path) as (image, _):
            values, affine = np.broadcast_to(np.uint8(0), _space(image.shape)), image.affine
    else:
        with _reading(path, "NRRD"):
            header = nrrd.read_header(str(path))
            values, affine = np.broadcast_to(np.uint8(0), tuple(header["sizes"])), _nrrd_affine(header)
    return _volume(path, values, affine)


def read_nifti(path: Path) -> Volume:
    """Read a NIfTI file of three axes; further ones of length one are dropped.

    Raises FileNotFoundError if it is missing, ValueError if it cannot be read or has other axes.
    """
    with _reading(path, "NIfTI"), _nifti(path) as (image, stream):
        values = np.asanyarray(image.dataobj)
        if isinstance(stream, gzip.GzipFile):
            # NiBabel stops behind the voxels; only at its end is the stream compared with its checksum.
            while stream.read(BLOCK):
                pass
    return _volume(path, values.reshape(_space(values.shape)), image.affine)


def write_nifti(
    path: Path,  # .nii or .nii.gz
    values: np.ndarray,  # [x, y, z], or [x, y, z, C]
    affine: np.ndarray,  # [4, 4]
) -> None:
    """Write a NIfTI file; it appears whole or not at all. ValueError for another ending."""
    if not has_ending(path, NIFTI_ENDINGS):
        raise ValueError(f"{path}: accepted are names that end in {' or '.join(NIFTI_ENDINGS)}")
    image = nibabel.Nifti1Image(values, affine)
    image.header.set_xyzt_units("mm")
    image.set_sform(affine, code="scanner")
    image.set_qform(affine, code="scanner")
    with replace_atomically(path) as temporary, Opener(str(temporary), "wb") as stream:
        image.to_stream(stream)  # type: ignore[arg-type]  # it does what a file does


def read_nrrd(path: Path) -> Volume:
    """Read a NRRD file of three axes; without a space it counts as LPS, without directions as 1 mm.

    Raises FileNotFoundError if it is missing, ValueError if it cannot be read, has other axes or an unknown space.
    """
    with _reading(path, "NRRD"):
        values, header = nrrd.read(str(path))
        affine = _nrrd_affine(header)
    return _volume(path, values, affine)


def read_dicom_series(folder: Path) -> Volume:
    """Read the one DICOM series below a folder, its values rescaled (CT: to Hounsfield units), float32.

    Raises ValueError if a file cannot be read or holds anything but one image of grey values, dark ones low, there is
    not exactly one series, its slices are not parallel, not one behind the other or not equally far apart.
    """
    series = _series(folder)
    values = np.empty(series.shape, np.float32)
    for index, slice in enumerate(series.slices):
        values[:, :, index] = slice.pixels().T
    return _volume(folder, values, series.affine)


@dataclass(frozen=True)
class _Series:
    """Slices in the order of their places, and what their headers say of all of them."""

    slices: Sequence["_Slice"]
    shape: tuple[int, int, int]  # columns, rows, slices
    affine: np.ndarray  # [4, 4]


def _series(folder: Path) -> _Series:
    paths = dicom_files(folder)
    if len(paths) < 2:
        raise ValueError(f"{folder}: holds {len(paths)} DICOM files; expected a series of slices")
    slices = [_read_slice(path) for path in paths]
    series = {slice.series: slice.path.relative_to(folder) for slice in slices}
    if len(series) > 1:
        one, other, *_ = series.values()
        raise ValueError(
            f"{folder}: holds {len(series)} DICOM series, {one} and {other} are of two of them; expected one"
        )
    first = slices[0]
    for slice in slices:
        for name, numbers in slice.numbers.items():
            if name in SAME_IN_A_SERIES and not np.allclose(numbers, first.numbers[name], atol=1e-4):
                raise ValueError(
                    f"{slice.path}: {name} is {numbers.tolist()}; another slice has {first.numbers[name].tolist()}"
                )
    along_x, along_y = first.numbers["ImageOrientationPatient"].reshape(2, 3)
    normal = np.cross(along_x, along_y)
    slices.sort(key=lambda slice: normal @ slice.numbers["ImagePositionPatient"])
    positions = np.array([slice.numbers["ImagePositionPatient"] for slice in slices])
    step = (positions[-1] - positions[0]) / (len(slices) - 1)
    gaps = np.diff(positions @ normal)
    if gaps.max() - gaps.min() >= 0.1 * np.median(gaps):  # both are 0 where all lie in one place
        raise ValueError(
            f"{folder}: slices lie {gaps.min():.2f} to {gaps.max():.2f} mm apart; "
            "expected equal gaps: a slice is missing or there twice"
        )
    if np.linalg.norm(np.cross(step, normal)) > SAME_DIRECTION * np.linalg.norm(step):
        raise ValueError(f"{folder}: slices are shifted against each other (a tilted gantry); expected none")
    rows, columns = (int(first.numbers[name][0]) for name in ("Rows", "Columns"))
    affine = np.eye(4)
    row_spacing, column_spacing = first.numbers["PixelSpacing"]
    affine[:3] = np.stack([along_x * column_spacing, along_y * row_spacing, step, positions[0]], axis=1)
    return _Series(slices, (columns, rows, len(slices)), np.diag([-1, -1, 1, 1]) @ affine)


def _nrrd_affine(header: Mapping[str, Any]) -> np.ndarray:
    if header["dimension"] != 3:
        raise ValueError(f"it has {header['dimension']} axes; expected three")
    affine = np.eye(4)
    if "space directions" in header:
        affine[:3, :3] = np.asarray(header["space directions"], dtype=float).T
        affine[:3, 3] = header.get("space origin", np.zeros(3))
    elif "spacings" in header:
        affine[:3, :3] = np.diag(header["spacings"])
    space = header.get("space", "left-posterior-superior")
    if space.lower() not in NRRD_SPACES:
        raise ValueError(f"its space is {space!r}; expected one of {', '.join(NRRD_SPACES)}")
    return np.diag([*NRRD_SPACES[space.lower()], 1]) @ affine


@dataclass(frozen=True)
class _Slice:
    """What a DICOM file of one image says of it; its pixels stay in the file."""

    path: Path
    series: str
    numbers: Mapping[str, np.ndarray]  # [n] float64 each, by the name of the element

    def pixels(self) -> np.ndarray:  # [rows, columns] float32
        """The values, read from the file and rescaled."""
        with _reading(self.path, "DICOM"):
            dataset = pydicom.dcmread(self.path)
            if "PixelData" not in dataset:
                raise ValueError("it has no PixelData; expected an image")
            slope, intercept = (self.numbers[name].astype(np.float32) for name in RESCALING)
            return dataset.pixel_array.astype(np.float32) * slope + intercept


def _read_slice(path: Path) -> _Slice:
    with _reading(path, "DICOM"):
        # The pixels of a folder with many series, which is refused, may be more than the memory holds.
        dataset = pydicom.dcmread(path, stop_before_pixels=True)
        for name in ("SeriesInstanceUID", *DICOM_NUMBERS):
            if name not in dataset and name not in RESCALING:
                raise ValueError(f"it has no {name}; expected an image with its position")
        for name, accepted in ONE_GREY_IMAGE.items():
            if dataset.get(name, accepted) != accepted:
                raise ValueError(f"its {name} is {dataset[name].value}; expected {accepted}")
        # pydicom reads an element when it is asked for: what is wrong with it is to be known here. A blank one is NaN.
        numbers = {
            name: np.array(dataset.get(name, RESCALING.get(name)), np.float64).ravel()
            for name in DICOM_NUMBERS
        }
        for name, count in DICOM_NUMBERS.items():
            if len(numbers[name]) != count or not np.isfinite(numbers[name]).all():
                raise ValueError(f"its {name} is {dataset[name].value}; expected {count} finite numbers")
        return _Slice(path, str(dataset.SeriesInstanceUID), numbers)


def _space(shape: tuple[int, ...]) -> tuple[int, ...]:
    """A shape without the axes of length one that some programs write behind the three of space."""
    return shape[:3] if all(side == 1 for side in shape[3:]) else shape


@contextmanager
def _nifti(path: Path) -> Iterator[tuple[nibabel.Nifti1Image, BufferedIOBase]]:
    """A NIfTI file with the stream its voxels are still to be read from."""
    opened = gzip.open if has_ending(path, (".gz",)) else open
    with opened(path, "rb") as stream:
        start = stream.read(HEADER)
        stream.seek(0)
        for kind in (nibabel.Nifti1Image, nibabel.Nifti2Image):
            if kind.header_class.may_contain_header(start):
                yield kind.from_stream(stream), stream
                return
        raise ValueError("it has no header of that kind")


@contextmanager
def _reading(path: Path, what: str) -> Iterator[None]:
    """Turn whatever a library raises for a file it cannot read into one ValueError."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: missing; expected a {what} file")
    try:
        yield
    except Exception as error:  # of damaged files the libraries raise nearly everything there is
        raise ValueError(f"{path}: cannot be read as {what} ({first_line(error)})") from error


def _volume(path: Path, values: np.ndarray, affine: np.ndarray) -> Volume:
    if values.ndim != 3 or 0 in values.shape:
        raise ValueError(f"{path}: has shape {values.shape}; expected three axes, none of them empty")
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    if not (np.isfinite(affine).all() and spacing.all() and abs(np.linalg.det(affine[:3, :3] / spacing)) > FLAT):
        raise ValueError(f"{path}: its header gives no direction for some axis; expected a spacing for each")
    if values.dtype.kind not in "biuf":
        raise ValueError(f"{path}: holds values of type {values.dtype}; expected one number a voxel")
    return Volume(path, values, affine)
