"""Small made-up scans in the files that challenges hand out."""

from collections.abc import Collection, Sequence
from copy import deepcopy
from pathlib import Path

import nibabel
import nrrd
import numpy as np
import pydicom
from pydicom.uid import CTImageStorage, EnhancedMRImageStorage, ExplicitVRLittleEndian, generate_uid

LPS = np.diag([-1.0, -1.0, 1.0, 1.0])  # array axes to the left, posterior and superior
FUNCTIONAL_GROUPS = {
    "PlanePositionSequence": ["ImagePositionPatient"],
    "PlaneOrientationSequence": ["ImageOrientationPatient"],
    "PixelMeasuresSequence": ["PixelSpacing"],
    "PixelValueTransformationSequence": ["RescaleSlope", "RescaleIntercept"],
}


def anatomy(
    random: np.random.Generator,
    shape: tuple[int, int, int],
    classes: int = 2,
) -> tuple[np.ndarray, np.ndarray]:
    """An image (intensities around 0 to 100) of a body with one off-centre ellipsoid per foreground class."""
    grid = np.stack(np.meshgrid(*(np.linspace(-1, 1, side) for side in shape), indexing="ij"))

    def ellipsoid(centre: tuple[float, float, float], radii: tuple[float, float, float]) -> np.ndarray:
        distance = (grid - np.reshape(centre, (3, 1, 1, 1))) / np.reshape(radii, (3, 1, 1, 1))
        return (distance**2).sum(0) < 1

    image = 40.0 * ellipsoid((0, 0, 0), (0.9, 0.8, 3))
    image[ellipsoid((0.4, 0.3, 0.1), (0.25, 0.3, 0.5))] = 0
    label = np.zeros(shape, np.uint8)
    for number in range(1, classes):
        there = ellipsoid((-0.35 + 0.03 * number, -0.25, -0.3 + 0.2 * number), (0.3, 0.2, 0.2))
        label[there] = number
        image[there] = 60 + 15 * number
    return image + random.normal(0, 4, shape), label


def write_nifti(path: Path, values: np.ndarray, affine: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(values, affine), path)


def write_nrrd(path: Path, values: np.ndarray, spacing: float = 1.0, **header: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    geometry = {
        "space": "left-posterior-superior",
        "space directions": np.eye(3) * spacing,
        "space origin": np.zeros(3),
    }
    nrrd.write(str(path), values, {**geometry, **header})


def write_dicom_series(
    folder: Path,
    values: np.ndarray,  # [x, y, z] Hounsfield units, axes to the left, posterior and superior
    spacing: tuple[float, float, float],
    origin: tuple[float, float, float] = (-100.0, -80.0, 30.0),
    intercept: int = -1024,
) -> None:
    """Write slices under names that are not in their order."""
    folder.mkdir(parents=True, exist_ok=True)
    series, study = generate_uid(), generate_uid()
    for number in range(values.shape[2]):
        slice = pydicom.Dataset()
        slice.file_meta = pydicom.dataset.FileMetaDataset()
        slice.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        slice.file_meta.MediaStorageSOPClassUID = slice.SOPClassUID = CTImageStorage
        slice.file_meta.MediaStorageSOPInstanceUID = slice.SOPInstanceUID = generate_uid()
        slice.SeriesInstanceUID, slice.StudyInstanceUID, slice.Modality = series, study, "CT"
        slice.ImagePositionPatient = [origin[0], origin[1], origin[2] + number * spacing[2]]
        slice.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
        slice.PixelSpacing = [spacing[1], spacing[0]]
        slice.Columns, slice.Rows = values.shape[:2]
        slice.SamplesPerPixel, slice.PhotometricInterpretation = 1, "MONOCHROME2"
        slice.BitsAllocated, slice.BitsStored, slice.HighBit, slice.PixelRepresentation = 16, 16, 15, 1
        slice.RescaleSlope, slice.RescaleIntercept = 1, intercept
        slice.PixelData = (np.rint(values[:, :, number].T) - intercept).astype(np.int16).tobytes()
        slice.save_as(folder / f"{number * 619 % 997:03d}.dcm", enforce_file_format=True)


def read_slices(folder: Path) -> list[pydicom.Dataset]:
    """The files of a series, in the order of their names."""
    return [pydicom.dcmread(path) for path in sorted(folder.iterdir())]


def enhanced_image(
    slices: Sequence[pydicom.Dataset],
    shared: Collection[str] = ("PlaneOrientationSequence", "PixelMeasuresSequence"),
) -> pydicom.Dataset:
    """The slices of a series as frames of one image, in their order; some functional groups are shared by all."""
    image = deepcopy(slices[0])
    image.SOPClassUID = image.file_meta.MediaStorageSOPClassUID = EnhancedMRImageStorage
    image.NumberOfFrames = len(slices)
    image.PixelData = b"".join(slice.PixelData for slice in slices)
    image.SharedFunctionalGroupsSequence = [functional_groups(slices[0], shared)]
    image.PerFrameFunctionalGroupsSequence = [
        functional_groups(slice, FUNCTIONAL_GROUPS.keys() - set(shared)) for slice in slices
    ]
    for names in FUNCTIONAL_GROUPS.values():
        for name in names:
            delattr(image, name)
    return image


def functional_groups(slice: pydicom.Dataset, groups: Collection[str]) -> pydicom.Dataset:
    """Some of them, with what the file of a slice says."""
    items = pydicom.Dataset()
    for group in groups:
        item = pydicom.Dataset()
        for name in FUNCTIONAL_GROUPS[group]:
            item[name] = deepcopy(slice[name])
        setattr(items, group, [item])
    return items


def left_atrium_source(root: Path, count: int = 5) -> Path:
    random = np.random.default_rng(0)
    for number in range(count):
        image, label = anatomy(random, (60, 50, 12))
        write_nrrd(root / f"CASE{number}" / "lgemri.nrrd", np.clip(image + 50, 0, 255).astype(np.uint8))
        write_nrrd(root / f"CASE{number}" / "laendo.nrrd", label * np.uint8(255))
    return root


def acdc_source(root: Path, patients: int = 4) -> Path:
    """Patients of whom the end-diastolic frame is not always the earlier one."""
    random = np.random.default_rng(0)
    affine = LPS @ np.diag([1.5, 1.5, 8.0, 1.0])
    for number in range(1, patients + 1):
        name = f"patient{number:03d}"
        frames = {"ED": 1, "ES": 12} if number % 2 else {"ED": 11, "ES": 4}
        for frame in frames.values():
            image, label = anatomy(random, (30 + number, 26, 8), 4)
            path = root / name / f"{name}_frame{frame:02d}.nii.gz"
            write_nifti(path, (10 * image + 300).astype(np.int16), affine)
            write_nifti(path.with_name(f"{name}_frame{frame:02d}_gt.nii.gz"), label, affine)
        lines = "".join(f"{phase}: {frame}\n" for phase, frame in frames.items())
        (root / name / "Info.cfg").write_text(lines + "Group: DCM\nHeight: 184.0\n")
    return root


def pancreas_source(root: Path, count: int = 3) -> Path:
    random = np.random.default_rng(0)
    spacing = (1.4, 1.4, 2.0)
    for number in range(1, count + 1):
        image, label = anatomy(random, (44, 40, 20))
        values = np.where(image < 20, -900, image)
        write_dicom_series(root / "DOI" / f"PANCREAS_{number:04d}" / "study" / "series", values, spacing)
        affine = LPS @ np.diag([*spacing, 1.0])
        affine[:3, 3] = (100.0, 80.0, 30.0)
        write_nifti(root / "labels" / f"label{number:04d}.nii.gz", label, affine)
    return root
