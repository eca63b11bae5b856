"""Files of scans, NIfTI, NRRD, MetaImage, DICOM and pictures, read with their place in space; masks written."""

import gzip
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
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
from semiseg.preparation.meta_image import (
    META_IMAGE_ENDINGS,
    read_meta_image,
    read_meta_image_header,
    write_meta_image,
)
from semiseg.preparation.pictures import (
    PICTURE_ENDINGS,
    read_picture,
    read_picture_header,
    read_picture_label,
    write_picture,
)
from semiseg.preparation.volume import SAME_DIRECTION, Volume, on_grid_of, origins_differ

# NRRD's names of the space its directions are given in, and the signs that lead from there to NIfTI's space.
NRRD_SPACES = {
    "left-posterior-superior": (-1, -1, 1),
    "left-anterior-superior": (-1, 1, 1),
    "right-anterior-superior": (1, 1, 1),
}
NRRD_SPACES |= {"".join(word[0] for word in name.split("-")): signs for name, signs in NRRD_SPACES.items()}
NIFTI_ENDINGS = (".nii.gz", ".nii")  # in small or large letters, as all endings
VOLUME_ENDINGS = (*NIFTI_ENDINGS, ".nrrd", *META_IMAGE_ENDINGS)
SCAN_ENDINGS = (*VOLUME_ENDINGS, *PICTURE_ENDINGS)
MASK_ENDINGS = (*NIFTI_ENDINGS, ".mha", ".png")
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


def is_picture(path: Path) -> bool:
    """Whether a scan is a picture, by its ending."""
    return has_ending(path, PICTURE_ENDINGS) and not path.is_dir()


def volume_files(folder: Path) -> list[Path]:
    """A folder's files of volumes, by their endings."""
    return [path for path in folder.iterdir() if has_ending(path, VOLUME_ENDINGS) and not is_hidden(path)]


def scans_in(folder: Path) -> list[Path]:
    """A folder's files of volumes and, each a scan, its folders with DICOM files below, in the order of their names.

    Where there is none of these, its pictures: beside volumes they only show them. Raises ValueError where a DICOM file lies in the folder itself.
    """
    series = {folder / path.relative_to(folder).parts[0] for path in dicom_files(folder)}
    for path in sorted(series):
        if path.is_file():
            raise ValueError(f"{path}: lies in the folder of all scans; expected a folder for every DICOM series")
    volumes = [*volume_files(folder), *series]
    return sorted(volumes or [path for path in folder.iterdir() if is_picture(path) and not is_hidden(path)])


def stem(path: Path) -> str:
    """A scan's name without its ending."""
    path = path.absolute()
    return next((path.name[: -len(end)] for end in SCAN_ENDINGS if has_ending(path, (end,))), path.name)


def read_channels(files: Sequence[Path]) -> list[Volume]:
    """Read a scan: the channels of its files, one after the other, on the grid of the first.

    Raises as `read_volumes` does, and ValueError where they lie on different grids or in different places.
    """
    return on_one_grid([volume for path in files for volume in read_volumes(path)])


def read_channel_headers(files: Sequence[Path]) -> list[Volume]:
    """Where the channels of a scan lie; all voxels are 0 here, and take no memory.

    Raises as `read_channels` does, as far as headers tell.
    """
    return on_one_grid([volume for path in files for volume in _headers(path)])


def on_one_grid(channels: Sequence[Volume]) -> list[Volume]:
    """The channels of a scan, turned along the axes of the first. ValueError where grids or places differ."""
    first = channels[0]
    placed = [first]
    for other in channels[1:]:
        turned = on_grid_of(first, other, "channel")
        if origins_differ(first, turned):
            raise ValueError(
                f"{other.path}: the channel lies elsewhere than {first.path}; expected channels of one place, resampled "
                "to one grid"
            )
        placed.append(replace(turned, affine=first.affine))  # so that all are turned alike from here on
    return placed


def read_volumes(path: Path) -> list[Volume]:
    """Read the channels of a NIfTI file (.nii, .nii.gz), NRRD file, MetaImage, picture, or a folder with one DICOM series.

    Several have NIfTI files along a fourth axis, MetaImages as components, pictures as colours. Raises FileNotFoundError
    if it is missing, ValueError if it is none of these or cannot be read.
    """
    if path.is_dir():
        return [read_dicom_series(path)]
    if is_picture(path):
        return read_picture(path)
    if has_ending(path, META_IMAGE_ENDINGS):
        return [_volume(path, volume.values, volume.affine) for volume in read_meta_image(path)]
    return _nifti_volumes(path) if has_ending(path, NIFTI_ENDINGS) else [read_nrrd(path)]


def read_volume(path: Path) -> Volume:
    """Read a label. Raises as `read_volumes` does, and ValueError for several channels or a picture of other colours
    than grey."""
    return read_picture_label(path) if is_picture(path) else _only(path, read_volumes(path))


def read_header(path: Path) -> Volume:
    """Where a label lies. Raises as `read_volume` does, as far as the header tells."""
    headers = _headers(path)
    return headers[0] if is_picture(path) else _only(path, headers)


def _headers(path: Path) -> list[Volume]:
    if is_picture(path):
        return read_picture_header(path)
    shape: tuple[int, ...]
    if path.is_dir():
        series = _series(path)
        shape, affine = series.shape, series.affine
    elif has_ending(path, META_IMAGE_ENDINGS):
        return [_volume(path, volume.values, volume.affine) for volume in read_meta_image_header(path)]
    elif has_ending(path, NIFTI_ENDINGS):
        with _reading(path, "NIfTI"), _nifti(path) as (image, _):
            shape, affine = image.shape, image.affine
    else:
        with _reading(path, "NRRD"):
            header = nrrd.read_header(str(path))
            shape, affine = tuple(header["sizes"]), _nrrd_affine(header)
    return _volumes(path, np.broadcast_to(np.uint8(0), shape), affine)


def read_nifti(path: Path) -> Volume:
    """Read a NIfTI file of three axes; further ones of length one are dropped.

    Raises FileNotFoundError if it is missing, ValueError if it cannot be read or has other axes.
    """
    return _only(path, _nifti_volumes(path))


def _nifti_volumes(path: Path) -> list[Volume]:
    with _reading(path, "NIfTI"), _nifti(path) as (image, stream):
        values = np.asanyarray(image.dataobj)
        if isinstance(stream, gzip.GzipFile):
            # NiBabel stops behind the voxels; only at its end is the stream compared with its checksum.
            while stream.read(BLOCK):
                pass
    return _volumes(path, values, image.affine)


def write_mask(
    path: Path,  # .nii.gz, .nii, .mha, or of one slice .png
    labels: np.ndarray,  # [x, y, z] uint8 or uint16
    affine: np.ndarray,  # [4, 4]
) -> None:
    """Write a mask; it appears whole or not at all. Raises as `check_mask`."""
    check_mask(path, labels.shape)
    if has_ending(path, (".png",)):
        write_picture(path, labels)
    elif has_ending(path, (".mha",)):
        write_meta_image(path, labels, affine)
    else:
        write_nifti(path, labels, affine)


def check_mask(path: Path, shape: Sequence[int]) -> None:
    """Raise ValueError for the name of a mask of another ending, or a PNG of several slices."""
    accepted = MASK_ENDINGS if shape[2] == 1 else MASK_ENDINGS[:-1]
    if not has_ending(path, accepted):
        raise ValueError(f"{path}: accepted for a mask of {shape[2]} slices are {', '.join(accepted)}")


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


def _only(path: Path, channels: Sequence[Volume]) -> Volume:
    if len(channels) > 1:
        raise ValueError(f"{path}: holds {len(channels)} channels; expected one")
    return channels[0]


def _volumes(
    path: Path,
    values: np.ndarray,  # [x, y, z], perhaps with an axis of channels behind, and others of length one
    affine: np.ndarray,  # [4, 4]
) -> list[Volume]:
    channels = values.squeeze(tuple(axis for axis in range(3, values.ndim) if values.shape[axis] == 1))
    if channels.ndim != 4:
        return [_volume(path, channels, affine)]
    return [_volume(path, channel, affine) for channel in np.moveaxis(channels, -1, 0)]


def _volume(path: Path, values: np.ndarray, affine: np.ndarray) -> Volume:
    if values.ndim != 3 or 0 in values.shape:
        raise ValueError(f"{path}: has shape {values.shape}; expected three axes, none of them empty")
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    if not (np.isfinite(affine).all() and spacing.all() and abs(np.linalg.det(affine[:3, :3] / spacing)) > FLAT):
        raise ValueError(f"{path}: its header gives no direction for some axis; expected a spacing for each")
    if values.dtype.kind not in "biuf":
        raise ValueError(f"{path}: holds values of type {values.dtype}; expected one number a voxel")
    return Volume(path, values, affine)
