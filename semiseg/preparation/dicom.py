"""DICOM series, slices in a file each or all in one enhanced file, read with their place in space."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, groupby
from pathlib import Path

import numpy as np
import pydicom
from pydicom import uid
from pydicom.misc import is_dicom
from pydicom.pixels import iter_pixels

from semiseg.errors import reading
from semiseg.preparation.file_names import SCAN_ENDINGS, has_ending, is_hidden
from semiseg.preparation.volume import SAME_DIRECTION, Volume, checked_volume

# Elements of a slice and how many numbers each has.
SAME_IN_A_SERIES = {"Rows": 1, "Columns": 1, "PixelSpacing": 2, "ImageOrientationPatient": 6}
DICOM_NUMBERS = {**SAME_IN_A_SERIES, "ImagePositionPatient": 3, "RescaleSlope": 1, "RescaleIntercept": 1}
RESCALING = {"RescaleSlope": 1.0, "RescaleIntercept": 0.0}  # where they are missing
ONE_GREY_IMAGE = {"SamplesPerPixel": 1, "NumberOfFrames": 1, "PhotometricInterpretation": "MONOCHROME2"}
ENHANCED_IMAGES = (
    uid.EnhancedCTImageStorage,
    uid.EnhancedMRImageStorage,
    uid.EnhancedPETImageStorage,
    uid.LegacyConvertedEnhancedCTImageStorage,
    uid.LegacyConvertedEnhancedMRImageStorage,
    uid.LegacyConvertedEnhancedPETImageStorage,
)
# Where an enhanced image says, of all frames or of each, what the file of a slice does of that.
FUNCTIONAL_GROUPS = (
    "PlanePositionSequence",
    "PlaneOrientationSequence",
    "PixelMeasuresSequence",
    "PixelValueTransformationSequence",
)
SAME_POSITION = 0.01  # mm along the normal
DICOM_INDEX = "DICOMDIR"  # lists the files beside it


def dicom_files(folder: Path) -> list[Path]:
    """The DICOM files anywhere below a folder, in the order of their names: `*.dcm`, and others by their content."""
    return sorted(path for path in folder.rglob("*") if path.is_file() and not is_hidden(path) and _is_dicom(path))


def _is_dicom(path: Path) -> bool:
    if has_ending(path, (".dcm",)):
        return True
    return path.name != DICOM_INDEX and not has_ending(path, SCAN_ENDINGS) and is_dicom(path)


def read_dicom_series(folder: Path) -> Volume:
    """Read the one DICOM series below a folder, its values rescaled (CT: to Hounsfield units), float32.

    Raises ValueError if a file cannot be read or holds anything but grey values, dark ones low, there is not exactly
    one series, of a slice in each file or of all in one, its slices are not parallel, not one behind the other or not
    equally far apart, or several lie at one position.
    """
    series = _series(folder)
    values = np.empty(series.shape, np.float32)
    files = groupby(series.slices, key=lambda slice: slice.path)
    for index, pixels in enumerate(chain.from_iterable(_pixels(path, slices) for path, slices in files)):
        values[:, :, index] = pixels.T
    return checked_volume(folder, values, series.affine)


def read_dicom_header(folder: Path) -> Volume:
    """Where a DICOM series lies; all voxels are 0 here, and take no memory.

    Raises as `read_dicom_series` does, as far as headers tell.
    """
    series = _series(folder)
    return checked_volume(folder, np.broadcast_to(np.uint8(0), series.shape), series.affine)


@dataclass(frozen=True)
class _Slice:
    """What a DICOM file says of one of its frames; the pixels stay in the file."""

    path: Path
    frame: int  # from 0 on
    series: str
    numbers: Mapping[str, np.ndarray]  # [n] float64 each, by the name of the element


@dataclass(frozen=True)
class _Series:
    """Slices in the order of their places, and what their headers say of all of them."""

    slices: Sequence[_Slice]
    shape: tuple[int, int, int]  # columns, rows, slices
    affine: np.ndarray  # [4, 4]


def _series(folder: Path) -> _Series:
    paths = dicom_files(folder)
    slices = [slice for path in paths for slice in _read_slices(path)]
    if len(slices) < 2:
        raise ValueError(
            f"{folder}: holds {len(paths)} DICOM files; expected a series of slices, or a file that holds several"
        )
    series = {slice.series: slice.path.relative_to(folder) for slice in slices}
    if len(series) > 1:
        one, other, *_ = series.values()
        raise ValueError(
            f"{folder}: holds {len(series)} DICOM series, {one} and {other} are of two of them; expected one"
        )
    if 1 < len(paths) < len(slices):
        raise ValueError(
            f"{folder}: holds {len(slices)} slices in {len(paths)} DICOM files; expected a file for each, or one for all"
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
    different = 1 + np.count_nonzero(gaps > SAME_POSITION)
    if len(paths) == 1 and different < len(slices):
        raise ValueError(
            f"{first.path}: holds {len(slices)} frames at {different} positions; expected one at each, "
            "of a single echo, time point or b-value"
        )
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


def _read_slices(path: Path) -> list[_Slice]:
    with reading(path, "DICOM"):
        # The pixels of a folder with many series, which is refused, may be more than the memory holds.
        dataset = pydicom.dcmread(path, stop_before_pixels=True)
        frames = _frames(dataset) if dataset.get("SOPClassUID") in ENHANCED_IMAGES else [dataset]
        return [_slice(path, number, frame) for number, frame in enumerate(frames)]


def _frames(image: pydicom.Dataset) -> Iterator[pydicom.Dataset]:
    """Of each frame of an enhanced image what the file of a slice would say."""
    shared = image.get("SharedFunctionalGroupsSequence", ())
    of_frames = image.get("PerFrameFunctionalGroupsSequence", ())
    number = image.get("NumberOfFrames")
    if len(of_frames) != number:
        raise ValueError(
            f"its NumberOfFrames is {number}, its PerFrameFunctionalGroupsSequence has {len(of_frames)} items; "
            "expected one for each frame"
        )
    for of_frame in of_frames:
        elements = dict(image.items())
        for groups in (*shared, of_frame):
            for name in FUNCTIONAL_GROUPS:
                for group in groups.get(name, ()):
                    elements.update(group.items())
        frame = pydicom.Dataset(elements)
        frame.NumberOfFrames = 1
        yield frame


def _slice(path: Path, frame: int, dataset: pydicom.Dataset) -> _Slice:
    for name in ("SeriesInstanceUID", *DICOM_NUMBERS):
        if name not in dataset and name not in RESCALING:
            raise ValueError(f"it has no {name}; expected an image with its position")
    for name, accepted in ONE_GREY_IMAGE.items():
        if dataset.get(name, accepted) != accepted:
            raise ValueError(f"its {name} is {dataset[name].value}; expected {accepted}")
    # pydicom reads an element when it is asked for: what is wrong with it is to be known here. A blank one is NaN.
    numbers = {
        name: np.array(dataset.get(name, RESCALING.get(name)), np.float64).ravel() for name in DICOM_NUMBERS
    }
    for name, count in DICOM_NUMBERS.items():
        if len(numbers[name]) != count or not np.isfinite(numbers[name]).all():
            raise ValueError(f"its {name} is {dataset[name].value}; expected {count} finite numbers")
    return _Slice(path, frame, str(dataset.SeriesInstanceUID), numbers)


def _pixels(path: Path, slices: Iterable[_Slice]) -> Iterator[np.ndarray]:  # [rows, columns] float32 each
    """The values of slices of one file, rescaled."""
    slices = list(slices)
    with reading(path, "DICOM"):
        dataset = pydicom.dcmread(path)
        if "PixelData" not in dataset:
            raise ValueError("it has no PixelData; expected an image")
        images = iter_pixels(dataset, indices=[slice.frame for slice in slices])
        for slice, pixels in zip(slices, images, strict=True):
            slope, intercept = (slice.numbers[name].astype(np.float32) for name in RESCALING)
            yield pixels.astype(np.float32) * slope + intercept
