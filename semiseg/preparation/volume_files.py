"""Files of scans, NIfTI, NRRD, MetaImage, DICOM and pictures, read with their place in space; masks written."""

import gzip
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from io import BufferedIOBase
from pathlib import Path
from typing import Any

import nibabel
import nrrd
import numpy as np
from nibabel.openers import Opener

from semiseg.atomic import replace_atomically
from semiseg.errors import reading
from semiseg.preparation.dicom import dicom_files, read_dicom_header, read_dicom_series
from semiseg.preparation.file_names import (
    MASK_ENDINGS,
    META_IMAGE_ENDINGS,
    NIFTI_ENDINGS,
    VOLUME_ENDINGS,
    has_ending,
    is_hidden,
    is_picture,
)
from semiseg.preparation.meta_image import read_meta_image, read_meta_image_header, write_meta_image
from semiseg.preparation.pictures import read_picture, read_picture_header, read_picture_label, write_picture
from semiseg.preparation.volume import Volume, checked_volume, on_grid_of, origins_differ

# NRRD's names of the space its directions are given in, and the signs that lead from there to NIfTI's space.
NRRD_SPACES = {
    "left-posterior-superior": (-1, -1, 1),
    "left-anterior-superior": (-1, 1, 1),
    "right-anterior-superior": (1, 1, 1),
}
NRRD_SPACES |= {"".join(word[0] for word in name.split("-")): signs for name, signs in NRRD_SPACES.items()}
HEADER, BLOCK = 540, 2**20  # bytes: the longest header of NIfTI, and what is read at once


def volume_files(folder: Path) -> list[Path]:
    """A folder's files of volumes, by their endings."""
    return [path for path in folder.iterdir() if has_ending(path, VOLUME_ENDINGS) and not is_hidden(path)]


def scans_in(folder: Path) -> list[Path]:
    """A folder's files of volumes and, each a scan, its folders with DICOM files below, in the order of their names.

    Where there is none of these, its pictures: beside volumes they only show them. Raises ValueError where a DICOM file lies
    in the folder itself.
    """
    series = {folder / path.relative_to(folder).parts[0] for path in dicom_files(folder)}
    for path in sorted(series):
        if path.is_file():
            raise ValueError(f"{path}: lies in the folder of all scans; expected a folder for every DICOM series")
    volumes = [*volume_files(folder), *series]
    return sorted(volumes or [path for path in folder.iterdir() if is_picture(path) and not is_hidden(path)])


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
        return read_meta_image(path)
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
    if path.is_dir():
        return [read_dicom_header(path)]
    if has_ending(path, META_IMAGE_ENDINGS):
        return read_meta_image_header(path)
    shape: tuple[int, ...]
    if has_ending(path, NIFTI_ENDINGS):
        with reading(path, "NIfTI"), _nifti(path) as (image, _):
            shape, affine = image.shape, image.affine
    else:
        with reading(path, "NRRD"):
            header = nrrd.read_header(str(path))
            shape, affine = tuple(header["sizes"]), _nrrd_affine(header)
    return _volumes(path, np.broadcast_to(np.uint8(0), shape), affine)


def read_nifti(path: Path) -> Volume:
    """Read a NIfTI file of one channel; further axes of length one are dropped.

    Raises FileNotFoundError if it is missing, ValueError if it cannot be read, has several channels or other axes.
    """
    return _only(path, _nifti_volumes(path))


def _nifti_volumes(path: Path) -> list[Volume]:
    with reading(path, "NIfTI"), _nifti(path) as (image, stream):
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
    with reading(path, "NRRD"):
        values, header = nrrd.read(str(path))
        affine = _nrrd_affine(header)
    return checked_volume(path, values, affine)


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
        return [checked_volume(path, channels, affine)]
    return [checked_volume(path, channel, affine) for channel in np.moveaxis(channels, -1, 0)]
