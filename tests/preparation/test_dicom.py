"""DICOM series: slices in a file each, and all in one enhanced file."""

import gc
import re
import shutil
import weakref
from pathlib import Path

import challenge_files as files
import numpy as np
import pydicom
import pytest
from pydicom.uid import RLELossless, SegmentationStorage, UltrasoundMultiFrameImageStorage
from scipy.spatial.transform import Rotation

from semiseg.preparation.dicom import read_dicom_series
from semiseg.preparation.volume_files import read_header

TURN = Rotation.from_euler("xyz", (25, -10, 40), degrees=True).as_matrix()


def test_slices_are_ordered_by_position_and_rescaled(tmp_path):
    values = np.arange(4 * 3 * 5, dtype=float).reshape(4, 3, 5) - 20
    files.write_dicom_series(tmp_path / "series", values, (0.7, 0.9, 2.5), origin=(-10, 20, -30))
    volume = read_dicom_series(tmp_path)
    np.testing.assert_array_equal(volume.values, values)
    assert volume.spacing == pytest.approx((0.7, 0.9, 2.5)) and volume.orientation == "LPS"
    np.testing.assert_allclose(volume.affine @ [1, 2, 3, 1], [10 - 0.7, -20 - 1.8, -30 + 7.5, 1])


def test_a_sagittal_series_is_ordered_along_its_normal(tmp_path):
    values = np.arange(4 * 3 * 5, dtype=float).reshape(4, 3, 5)
    files.write_dicom_series(tmp_path, values, (0.7, 0.9, 2.5))
    for path in tmp_path.iterdir():
        slice = pydicom.dcmread(path)
        number = (slice.ImagePositionPatient[2] - 30) / 2.5
        slice.ImageOrientationPatient = [0, 1, 0, 0, 0, -1]  # columns to posterior, rows to inferior
        slice.ImagePositionPatient = [-50 - 2.5 * number, -80, 60]  # from left to right
        slice.save_as(path)
    volume = read_dicom_series(tmp_path)
    np.testing.assert_array_equal(volume.values, values)
    assert volume.spacing == pytest.approx((0.7, 0.9, 2.5)) and volume.orientation == "PIR"
    np.testing.assert_allclose(volume.affine @ [1, 2, 3, 1], [50 + 7.5, 80 - 0.7, 60 - 1.8, 1])
    (tmp_path / "241.dcm").unlink()  # the third of five
    with pytest.raises(ValueError, match="slices lie 2.50 to 5.00 mm apart"):
        read_dicom_series(tmp_path)


def test_hidden_files_beside_the_slices_are_none(tmp_path):
    """Such as those that macOS puts beside each file on a stick."""
    files.write_dicom_series(tmp_path / "series", np.arange(60.0).reshape(4, 3, 5), (1.0, 1.0, 2.0))
    for path in list((tmp_path / "series").iterdir()):
        path.with_name(f"._{path.name}").write_bytes(b"\0\5\x16\7")
    assert read_dicom_series(tmp_path).values.shape == (4, 3, 5)


def test_dicom_files_are_known_without_an_ending(tmp_path):
    """As archives hand them out, with an index beside them."""
    values = np.arange(4 * 3 * 5, dtype=float).reshape(4, 3, 5)
    files.write_dicom_series(tmp_path / "images" / "series", values, (1.0, 1.0, 2.0))
    expected = read_dicom_series(tmp_path)
    first, *_ = paths = sorted((tmp_path / "images" / "series").iterdir())
    shutil.copy(first, tmp_path / "DICOMDIR")
    for number, path in enumerate(paths):
        path.rename(path.with_name(f"1.2.840.{number}" if number else "IM0"))
    (tmp_path / "LICENSE").write_text("As you like.")
    series, header = read_dicom_series(tmp_path), read_header(tmp_path)
    np.testing.assert_array_equal(series.values, values)
    assert header.values.shape == values.shape
    for volume in (series, header):
        np.testing.assert_array_equal(volume.affine, expected.affine)


def test_pixels_are_read_of_one_series_only_slice_by_slice(tmp_path, monkeypatch):
    values = np.arange(4 * 3 * 5, dtype=float).reshape(4, 3, 5)
    for name in ("one", "two"):
        files.write_dicom_series(tmp_path / name, values, (1.0, 1.0, 2.0))
    read, with_pixels = pydicom.dcmread, []

    def recorded(*arguments, **options):
        gc.collect()
        assert not any(slice() for slice in with_pixels)
        slice = read(*arguments, **options)
        if "PixelData" in slice:
            with_pixels.append(weakref.ref(slice))
        return slice

    monkeypatch.setattr(pydicom, "dcmread", recorded)
    with pytest.raises(ValueError, match=r"holds 2 DICOM series, one/\d+.dcm and two/\d+.dcm are of two of them"):
        read_dicom_series(tmp_path)
    assert not with_pixels
    np.testing.assert_array_equal(read_dicom_series(tmp_path / "one").values, values)
    assert len(with_pixels) == 5


def colours(slice: pydicom.Dataset) -> None:
    slice.SamplesPerPixel, slice.PhotometricInterpretation, slice.PlanarConfiguration = 3, "RGB", 0
    slice.BitsAllocated, slice.BitsStored, slice.HighBit, slice.PixelRepresentation = 8, 8, 7, 0
    slice.PixelData = bytes(4 * 3 * 3)


def frames(slice: pydicom.Dataset) -> None:
    slice.NumberOfFrames = 2
    slice.PixelData = 2 * slice.PixelData


def without_pixels(slice: pydicom.Dataset) -> None:
    del slice.PixelData


def undecodable(slice: pydicom.Dataset) -> None:
    del slice.SOPInstanceUID
    slice.PixelData = slice.PixelData[:10]


def element(name: str, value: object):
    return lambda slice: setattr(slice, name, value)


@pytest.mark.parametrize(("damage", "message"), [
    (element("PixelSpacing", None), "its PixelSpacing is None; expected 2 finite numbers"),
    (element("PixelSpacing", [1.0]), "its PixelSpacing is 1.0; expected 2 finite numbers"),
    (element("ImageOrientationPatient", None), "its ImageOrientationPatient is None; expected 6 finite numbers"),
    (element("ImagePositionPatient", None), "its ImagePositionPatient is None; expected 3 finite numbers"),
    (element("RescaleSlope", None), "its RescaleSlope is None; expected 1 finite numbers"),
    (element("Rows", None), "its Rows is None; expected 1 finite numbers"),
    (element("BitsAllocated", 12), ""),
    (element("BitsAllocated", None), ""),
    (element("PhotometricInterpretation", "MONOCHROME1"),
     "its PhotometricInterpretation is MONOCHROME1; expected MONOCHROME2"),
    (colours, "its SamplesPerPixel is 3; expected 1"),
    (frames, "its NumberOfFrames is 2; expected 1"),
    (without_pixels, "it has no PixelData; expected an image"),
    (undecodable, ""),
])  # fmt: skip
def test_a_damaged_slice_is_named(tmp_path, damage, message):
    files.write_dicom_series(tmp_path, np.zeros((4, 3, 5)), (1.0, 1.0, 2.0))
    path = sorted(tmp_path.iterdir())[2]
    slice = pydicom.dcmread(path)
    damage(slice)
    slice.save_as(path)
    with pytest.raises(ValueError, match=re.escape(f"{path}: cannot be read as DICOM ({message}")) as raised:
        read_dicom_series(tmp_path)
    assert "\n" not in str(raised.value)


def test_a_value_that_pydicom_reads_when_it_is_asked_for_is_named(tmp_path):
    files.write_dicom_series(tmp_path, np.zeros((4, 3, 5)), (1.0, 1.0, 2.0))
    path = min(tmp_path.iterdir())
    content = path.read_bytes()
    assert content.count(b"1.0\\1.0") == 1
    path.write_bytes(content.replace(b"1.0\\1.0", b"1.0\\a.b"))
    with pytest.raises(ValueError, match=f"{path}: cannot be read as DICOM"):
        read_dicom_series(tmp_path)


def oblique_slices(folder: Path) -> list[pydicom.Dataset]:
    """Write a series of slices of 0.7 × 0.9 mm, 2.5 mm apart, each with a rescaling of its own."""
    files.write_dicom_series(folder, np.arange(4 * 3 * 5, dtype=float).reshape(4, 3, 5), (0.7, 0.9, 2.5), intercept=0)
    slices = files.read_slices(folder)
    for slice in slices:
        height = slice.ImagePositionPatient[2] - 30
        slice.ImageOrientationPatient = [*TURN[:, 0], *TURN[:, 1]]
        slice.ImagePositionPatient = list(np.array([-10, 20, -30]) + height * TURN[:, 2])
        slice.RescaleSlope, slice.RescaleIntercept = 1 + height, -height
        slice.save_as(slice.filename)
    return slices


def save(image: pydicom.Dataset, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save_as(path, enforce_file_format=True)


@pytest.mark.parametrize("shared", [
    ("PlaneOrientationSequence", "PixelMeasuresSequence"), (), ("PixelMeasuresSequence",),
])  # fmt: skip
@pytest.mark.parametrize("uid", ["1.2.840.10008.5.1.4.1.1.2.1", "1.2.840.10008.5.1.4.1.1.4.4"])
@pytest.mark.parametrize("compressed", [False, True])
def test_an_enhanced_file_is_read_as_its_slices(tmp_path, shared, uid, compressed):
    slices = oblique_slices(tmp_path / "slices")
    heights = [np.dot(slice.ImagePositionPatient, TURN[:, 2]) for slice in slices]
    assert np.diff(heights).min() < 0 < np.diff(heights).max()
    image = files.enhanced_image(slices, shared)
    image.SOPClassUID = image.file_meta.MediaStorageSOPClassUID = uid
    if compressed:
        image.compress(RLELossless)
    save(image, tmp_path / "enhanced" / "study" / "IM0")
    volume, header = read_dicom_series(tmp_path / "enhanced"), read_header(tmp_path / "enhanced")
    along = 2.5 * np.arange(5)
    expected = np.arange(4 * 3 * 5).reshape(4, 3, 5) * (1 + along) - along
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = TURN * (0.7, 0.9, 2.5), (-10, 20, -30)
    np.testing.assert_array_equal(volume.values, expected)
    np.testing.assert_allclose(volume.affine, files.LPS @ affine, atol=1e-6)
    of_slices = read_dicom_series(tmp_path / "slices")
    np.testing.assert_array_equal(volume.values, of_slices.values)
    assert header.values.shape == volume.values.shape and volume.values.dtype == of_slices.values.dtype
    for other in (header, of_slices):
        np.testing.assert_array_equal(volume.affine, other.affine)


def test_rescaling_is_shared_or_missing(tmp_path):
    values = np.arange(4 * 3 * 5, dtype=float).reshape(4, 3, 5)
    files.write_dicom_series(tmp_path / "slices", values, (1.0, 1.0, 2.0))
    slices = files.read_slices(tmp_path / "slices")
    image = files.enhanced_image(slices, ("PixelValueTransformationSequence",))
    save(image, tmp_path / "scan" / "a.dcm")
    np.testing.assert_array_equal(read_dicom_series(tmp_path / "scan").values, values)
    del image.SharedFunctionalGroupsSequence
    save(image, tmp_path / "scan" / "a.dcm")
    np.testing.assert_array_equal(read_dicom_series(tmp_path / "scan").values, values + 1024)


def test_enhanced_files_of_one_frame_are_slices(tmp_path):
    slices = oblique_slices(tmp_path / "slices")
    expected = read_dicom_series(tmp_path / "slices")
    for slice in slices:
        save(files.enhanced_image([slice]), Path(slice.filename))
    volume = read_dicom_series(tmp_path / "slices")
    np.testing.assert_array_equal(volume.values, expected.values)
    np.testing.assert_array_equal(volume.affine, expected.affine)
    for slice in slices[1:]:
        Path(slice.filename).unlink()
    with pytest.raises(ValueError, match="slices: holds 1 DICOM files; expected a series of slices, or a file that"):
        read_dicom_series(tmp_path / "slices")


def two_echoes(slices: list[pydicom.Dataset]) -> list[pydicom.Dataset]:
    return slices + slices


def in_one_place(slices: list[pydicom.Dataset]) -> list[pydicom.Dataset]:
    return slices[:1] * 4


def without_one(slices: list[pydicom.Dataset]) -> list[pydicom.Dataset]:
    return [slice for slice in slices if slice.RescaleIntercept != -5]


def tilted(slices: list[pydicom.Dataset]) -> list[pydicom.Dataset]:
    for slice in slices:
        slice.ImagePositionPatient[1] += slice.RescaleIntercept
    return slices


def with_another(name: str, value: list[float]):
    def change(slices: list[pydicom.Dataset]) -> list[pydicom.Dataset]:
        setattr(slices[2], name, value)
        return slices

    return change


@pytest.mark.parametrize(("change", "message"), [
    (two_echoes, "a.dcm: holds 10 frames at 5 positions; expected one at each, of a single echo, time point or b-value"),
    (in_one_place, "a.dcm: holds 4 frames at 1 positions; expected one at each"),
    (without_one, "slices lie 2.50 to 5.00 mm apart; expected equal gaps"),
    (tilted, "slices are shifted against each other"),
    (with_another("ImageOrientationPatient", [1, 0, 0, 0, 1, 0]), "a.dcm: ImageOrientationPatient is [1.0, "),
    (with_another("PixelSpacing", [0.7, 0.7]), "a.dcm: PixelSpacing is [0.7, 0.7]; another slice has [0.9, 0.7]"),
])  # fmt: skip
def test_frames_that_are_no_volume_are_refused(tmp_path, change, message):
    slices = change(oblique_slices(tmp_path / "slices"))
    save(files.enhanced_image(slices, shared=()), tmp_path / "scan" / "a.dcm")
    for read in (read_dicom_series, read_header):
        with pytest.raises(ValueError, match=re.escape(message)) as raised:
            read(tmp_path / "scan")
        assert str(tmp_path / "scan") in str(raised.value) and "\n" not in str(raised.value)


def without_groups(image: pydicom.Dataset) -> None:
    del image.SharedFunctionalGroupsSequence, image.PerFrameFunctionalGroupsSequence


def without_group(name: str):
    def damage(image: pydicom.Dataset) -> None:
        for groups in (image.SharedFunctionalGroupsSequence[0], image.PerFrameFunctionalGroupsSequence[2]):
            groups.pop(name, None)

    return damage


def without_items(image: pydicom.Dataset) -> None:
    image.PerFrameFunctionalGroupsSequence[2].PlanePositionSequence = []


def blank_slope(image: pydicom.Dataset) -> None:
    image.PerFrameFunctionalGroupsSequence[2].PixelValueTransformationSequence[0].RescaleSlope = None


def without_the_last_item(image: pydicom.Dataset) -> None:
    image.PerFrameFunctionalGroupsSequence.pop()


def without_number(image: pydicom.Dataset) -> None:
    del image.NumberOfFrames


def colour_frames(image: pydicom.Dataset) -> None:
    image.SamplesPerPixel, image.PhotometricInterpretation = 3, "RGB"


@pytest.mark.parametrize(("damage", "message"), [
    (without_groups, "its NumberOfFrames is 5, its PerFrameFunctionalGroupsSequence has 0 items; expected one for each"),
    (without_the_last_item, "its NumberOfFrames is 5, its PerFrameFunctionalGroupsSequence has 4 items; expected one"),
    (without_number, "its NumberOfFrames is None, its PerFrameFunctionalGroupsSequence has 5 items; expected one"),
    (without_group("PlanePositionSequence"), "it has no ImagePositionPatient; expected an image with its position"),
    (without_group("PlaneOrientationSequence"), "it has no ImageOrientationPatient; expected an image with"),
    (without_group("PixelMeasuresSequence"), "it has no PixelSpacing; expected an image with its position"),
    (without_items, "it has no ImagePositionPatient; expected an image with its position"),
    (blank_slope, "its RescaleSlope is None; expected 1 finite numbers"),
    (element("PhotometricInterpretation", "MONOCHROME1"), "its PhotometricInterpretation is MONOCHROME1; expected"),
    (colour_frames, "its SamplesPerPixel is 3; expected 1"),
    (element("SOPClassUID", SegmentationStorage), "it has no PixelSpacing; expected an image with its position"),
    (element("SOPClassUID", UltrasoundMultiFrameImageStorage), "it has no PixelSpacing; expected an image with its"),
])  # fmt: skip
def test_a_damaged_enhanced_file_is_named(tmp_path, damage, message):
    image = files.enhanced_image(oblique_slices(tmp_path / "slices"))
    damage(image)
    path = tmp_path / "scan" / "a.dcm"
    save(image, path)
    for read in (read_dicom_series, read_header):
        with pytest.raises(ValueError, match=re.escape(f"{path}: cannot be read as DICOM ({message}")) as raised:
            read(tmp_path / "scan")
        assert "\n" not in str(raised.value)


def truncated(image: pydicom.Dataset) -> None:
    image.PixelData = image.PixelData[:-2]


def compressed_without_the_last_frame(image: pydicom.Dataset) -> None:
    frame = pydicom.pixels.encoders.RLELosslessEncoder.encode(image, index=0)
    image.PixelData = pydicom.encaps.encapsulate([frame] * 4)
    image["PixelData"].VR = "OB"
    image.file_meta.TransferSyntaxUID = RLELossless


@pytest.mark.parametrize("damage", [truncated, compressed_without_the_last_frame, without_pixels])
def test_frames_that_are_missing_are_found_when_the_header_is_read_no_more(tmp_path, damage):
    image = files.enhanced_image(oblique_slices(tmp_path / "slices"))
    damage(image)
    path = tmp_path / "scan" / "a.dcm"
    save(image, path)
    assert read_header(tmp_path / "scan").values.shape == (4, 3, 5)
    with pytest.raises(ValueError, match=f"{path}: cannot be read as DICOM") as raised:
        read_dicom_series(tmp_path / "scan")
    assert "\n" not in str(raised.value)


def test_a_truncated_file_is_named(tmp_path):
    path = tmp_path / "scan" / "a.dcm"
    save(files.enhanced_image(oblique_slices(tmp_path / "slices")), path)
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ValueError, match=f"{path}: cannot be read as DICOM"):
        read_dicom_series(tmp_path / "scan")


def test_an_enhanced_file_lies_alone(tmp_path):
    slices = oblique_slices(tmp_path / "slices")
    image = files.enhanced_image(slices)
    for folder in ("slices", "two", "series"):
        save(image, tmp_path / folder / "a.dcm")
    save(image, tmp_path / "two" / "b.dcm")
    image.SeriesInstanceUID = pydicom.uid.generate_uid()
    save(image, tmp_path / "series" / "b.dcm")
    for folder, message in {
        "slices": "holds 10 slices in 6 DICOM files; expected a file for each, or one for all",
        "two": "holds 10 slices in 2 DICOM files; expected a file for each, or one for all",
        "series": "holds 2 DICOM series, a.dcm and b.dcm are of two of them; expected one",
    }.items():
        for read in (read_dicom_series, read_header):
            with pytest.raises(ValueError, match=f"{tmp_path / folder}: {message}"):
                read(tmp_path / folder)
