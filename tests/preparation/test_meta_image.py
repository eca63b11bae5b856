"""MetaImage files against SimpleITK's, and what is refused."""

import re
import zlib

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from semiseg.preparation.meta_image import read_meta_image, read_meta_image_header, write_meta_image

HEADER = """ObjectType = Image
NDims = 3
BinaryData = True
DimSize = 4 3 5
ElementType = MET_SHORT
ElementDataFile = LOCAL
"""
VALUES = np.arange(4 * 3 * 5, dtype=np.int16).reshape(4, 3, 5) - 20
BYTES = VALUES.tobytes(order="F")
PIXELS = ["u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8", "f4", "f8"]


@pytest.fixture
def itk():
    return pytest.importorskip("SimpleITK")


def oblique_affine() -> np.ndarray:  # [4, 4]
    affine = np.eye(4)
    affine[:3, :3] = Rotation.from_euler("xyz", (20, -35, 50), degrees=True).as_matrix() * (0.7, 1.3, 2.5)
    affine[:3, 3] = -12.3, 45.6, 0.1
    return affine


def itk_affine(image) -> np.ndarray:  # [4, 4]
    """Where ITK places voxels, in NIfTI's space."""
    first = np.array(image.TransformIndexToPhysicalPoint((0, 0, 0)))
    affine = np.eye(4)
    affine[:3, 3] = first
    for axis, step in enumerate(np.eye(3, dtype=int).tolist()):
        affine[:3, axis] = image.TransformIndexToPhysicalPoint(step) - first
    return np.diag([-1, -1, 1, 1]) @ affine


def itk_values(image) -> np.ndarray:  # [C, x, y, z]
    import SimpleITK

    values = SimpleITK.GetArrayFromImage(image)
    return np.moveaxis(values.reshape(*values.shape[:3], -1), -1, 0).transpose(0, 3, 2, 1)


def itk_image(itk, values, components: int = 1):
    """An oblique image of [x, y, z] values, whose further components are each one higher."""
    image = itk.GetImageFromArray(values.transpose(2, 1, 0))
    affine = np.diag([-1, -1, 1, 1]) @ oblique_affine()
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    if components > 1:
        image = itk.Compose([image + number for number in range(components)])
    image.SetSpacing(spacing.tolist())
    image.SetDirection((affine[:3, :3] / spacing).ravel().tolist())
    image.SetOrigin(affine[:3, 3].tolist())
    return image


def check(path, image):
    """That a file holds an image of SimpleITK, as far as both functions tell."""
    volumes, headers, expected = read_meta_image(path), read_meta_image_header(path), itk_values(image)
    assert len(volumes) == len(headers) == len(expected)
    for volume, header, values in zip(volumes, headers, expected, strict=True):
        np.testing.assert_array_equal(volume.values, values)
        assert volume.values.dtype == values.dtype and volume.values.flags.writeable
        assert header.values.shape == values.shape and not any(header.values.strides)
        for affine in (volume.affine, header.affine):
            np.testing.assert_allclose(affine, itk_affine(image), atol=1e-12)
        assert volume.path == header.path == path


@pytest.mark.parametrize("dtype", PIXELS)
@pytest.mark.parametrize("compressed", [False, True])
def test_files_of_simpleitk(itk, tmp_path, dtype, compressed):
    image = itk_image(itk, (VALUES + 20).astype(dtype))
    for name in ("scan.mha", "scan.mhd"):
        itk.WriteImage(image, str(tmp_path / name), compressed)
        check(tmp_path / name, image)
    np.testing.assert_allclose(read_meta_image(tmp_path / "scan.mha")[0].affine, oblique_affine(), atol=1e-12)


@pytest.mark.parametrize("compressed", [False, True])
def test_every_component_is_a_volume(itk, tmp_path, compressed):
    image = itk_image(itk, VALUES, components=2)
    itk.WriteImage(image, str(tmp_path / "scan.mha"), compressed)
    check(tmp_path / "scan.mha", image)
    for number, volume in enumerate(read_meta_image(tmp_path / "scan.mha")):
        np.testing.assert_array_equal(volume.values, VALUES + number)


@pytest.mark.parametrize(
    "change",
    [
        (
            "BinaryData = True\n",
            "ElementSpacing = 0.5 2 3\nOffset = 1 2 3\nTransformMatrix = 0 1 0 0 0 -1 1 0 0\n",
        ),
        ("BinaryData = True\n", "ElementSize = 0.5 2 3\nOrigin = 1 2 3\nRotation = 0 1 0 0 0 -1 1 0 0\n"),
        ("BinaryData = True\n", "Position = 1 2 3\nOrientation = 0 1 0 0 0 -1 1 0 0\n"),
        ("BinaryData = True\n", "ElementSpacing = 0.5 2 3\nElementSize = 4 4 4\n"),
        ("BinaryData = True\n", "ElementSize = 4 4 4\nElementSpacing = 0.5 2 3\n"),
        ("BinaryData = True\n", "ElementSpacing = -0.5 2 3\n"),
        ("BinaryData = True\n", "BinaryDataByteOrderMSB = True\n"),
        ("BinaryData = True\n", "ElementByteOrderMSB = true\n"),
        (
            "BinaryData = True\n",
            "AnatomicalOrientation = LPS\nCenterOfRotation = 1 1 1\nComment = a = b: c\n",
        ),
        (" = ", "="),
        (" = ", " : "),
        ("DimSize = 4 3 5\nElementType = MET_SHORT", "DimSize = 1 6 5\nElementType = MET_LONG"),
        ("DimSize = 4 3 5\nElementType = MET_SHORT", "DimSize = 1 6 5\nElementType = MET_ULONG"),
    ],
)
def test_headers_are_understood_as_by_simpleitk(itk, tmp_path, change):
    path = tmp_path / "scan.mha"
    path.write_bytes(HEADER.replace(*change).encode() + BYTES)
    check(path, itk.ReadImage(str(path)))


def test_lines_may_end_as_on_windows(itk, tmp_path):
    path = tmp_path / "scan.mha"
    path.write_bytes(HEADER.replace("\n", "\r\n").encode() + BYTES)
    check(path, itk.ReadImage(str(path)))


@pytest.mark.parametrize("shape", [(4, 3, 5), (4, 3, 5, 1), (4, 3, 5, 2)])
@pytest.mark.parametrize("dtype", ["u1", "u2", "<f4", ">i2"])
def test_simpleitk_reads_what_is_written(itk, tmp_path, shape, dtype):
    path = tmp_path / "scan.MHA"
    values = np.arange(np.prod(shape)).reshape(shape).astype(dtype)
    write_meta_image(path, values, oblique_affine())
    image = itk.ReadImage(str(path), imageIO="MetaImageIO")
    np.testing.assert_array_equal(itk_values(image), np.moveaxis(values.reshape(4, 3, 5, -1), -1, 0))
    np.testing.assert_allclose(itk_affine(image), oblique_affine(), atol=1e-12)
    check(path, image)
    assert list(tmp_path.iterdir()) == [path]


def test_writing_and_reading_lose_nothing(tmp_path):
    path = tmp_path / "scan.mha"
    write_meta_image(path, VALUES, oblique_affine())
    (volume,) = read_meta_image(path)
    np.testing.assert_array_equal(volume.values, VALUES)
    np.testing.assert_allclose(volume.affine, oblique_affine(), rtol=1e-15, atol=1e-15)


def test_what_fails_to_be_written_leaves_nothing(tmp_path):
    with pytest.raises(ValueError, match="scan.mhd: accepted are names that end in .mha"):
        write_meta_image(tmp_path / "scan.mhd", VALUES, np.eye(4))
    with pytest.raises(OSError, match="cannot write .*scan.mha"):
        write_meta_image(tmp_path / "none" / "scan.mha", VALUES, np.eye(4))
    assert not list(tmp_path.iterdir())


def test_a_file_of_voxels_with_a_name_that_is_not_utf8(tmp_path):
    name = b"\xe9.raw".decode(errors="surrogateescape")
    (tmp_path / name).write_bytes(BYTES)
    (tmp_path / "scan.mhd").write_bytes(HEADER.replace("LOCAL", name).encode(errors="surrogateescape"))
    np.testing.assert_array_equal(read_meta_image(tmp_path / "scan.mhd")[0].values, VALUES)


@pytest.mark.parametrize(
    "change, message",
    [
        (("MET_SHORT", "MET_FOO"), "its ElementType is MET_FOO; expected one of MET_CHAR, "),
        (("ElementType = MET_SHORT\n", ""), "its ElementType is missing"),
        (("DimSize = 4 3 5\n", ""), "its DimSize is missing; expected 3 finite numbers"),
        (("4 3 5", "4 15"), "its DimSize is 4 15; expected 3 finite numbers"),
        (("4 3 5", "4 3 5 1"), "its DimSize is 4 3 5 1; expected 3 finite numbers"),
        (("4 3 5", "4 3 five"), "its DimSize is 4 3 five; expected 3 finite numbers"),
        (("4 3 5", "4 -3 -5"), "its DimSize is 4 -3 -5; expected sides and channels from 1 on"),
        (("4 3 5", "4 3 0"), "its DimSize is 4 3 0; expected sides and channels from 1 on"),
        (("4 3 5", "4e9 3e9 5e9"), ""),
        (("BinaryData = True", "BinaryData = False"), "voxels that are not written as text"),
        (
            ("BinaryData = True", "ElementSpacing = 1 nan 1"),
            "its ElementSpacing is 1 nan 1; expected 3 finite numbers",
        ),
        (("BinaryData = True", "Origin = 1 2"), "its Offset is 1 2; expected 3 finite numbers"),
        (
            ("BinaryData = True", "TransformMatrix = 1 0 0 1"),
            "its TransformMatrix is 1 0 0 1; expected 9 finite numbers",
        ),
        (("BinaryData = True", "ElementNumberOfChannels = 0"), "expected sides and channels from 1 on"),
        (
            ("BinaryData = True", "a photograph"),
            "expected lines 'Name = value', the last one of ElementDataFile",
        ),
        (("ElementDataFile = LOCAL\n", ""), "expected lines 'Name = value', the last one of ElementDataFile"),
    ],
)
@pytest.mark.parametrize("read", [read_meta_image, read_meta_image_header])
def test_headers_that_are_refused(tmp_path, read, change, message):
    path = tmp_path / "scan.mha"
    path.write_bytes(HEADER.replace(*change).encode() + BYTES)
    with pytest.raises(
        ValueError, match=rf"^{re.escape(str(path))}: cannot be read as MetaImage \(.*{message}.*\)$"
    ):
        read(path)


COMPRESSED = zlib.compress(BYTES)


@pytest.mark.parametrize(
    "compressed, data",
    [
        (False, BYTES[:-1]),
        (False, BYTES + b"\0"),
        (False, b""),
        (True, BYTES),
        (True, COMPRESSED[:-1]),
        (True, COMPRESSED[:30]),
        (True, COMPRESSED[:-1] + b"\0"),  # its checksum
        (True, zlib.compress(BYTES[:-2])),
        (True, zlib.compress(bytes(10**6))),
        (True, b""),
    ],
)
def test_voxels_that_are_not_whole(tmp_path, compressed, data):
    path = tmp_path / "scan.mha"
    path.write_bytes(
        HEADER.replace("BinaryData", f"CompressedData = {compressed}\nBinaryData").encode() + data
    )
    assert read_meta_image_header(path)
    with pytest.raises(ValueError, match=rf"^{re.escape(str(path))}: cannot be read as MetaImage \(.*\)$"):
        read_meta_image(path)


def test_files_that_are_missing_or_of_another_kind(tmp_path):
    for read in (read_meta_image, read_meta_image_header):
        for path in (tmp_path / "none.mha", tmp_path):
            with pytest.raises(FileNotFoundError, match=f"{path}: missing; expected a MetaImage file"):
                read(path)
        for data in (b"", b"\0" * 10**6, np.random.default_rng(0).bytes(10**5)):
            (tmp_path / "other.mha").write_bytes(data)
            with pytest.raises(ValueError, match="other.mha: cannot be read as MetaImage"):
                read(tmp_path / "other.mha")
    (tmp_path / "scan.mhd").write_text(HEADER.replace("LOCAL", "scan.raw"))
    with pytest.raises(ValueError, match=r"scan.mhd: cannot be read as MetaImage \(.*scan.raw"):
        read_meta_image(tmp_path / "scan.mhd")


def test_a_damaged_file_is_read_right_or_refused(tmp_path):
    """Wherever bytes change, compressed voxels are never wrong."""
    path, rng = tmp_path / "scan.mha", np.random.default_rng(0)
    write_meta_image(path, VALUES, np.diag([-1, -1, 1, 1]))
    whole = path.read_bytes()
    start = whole.index(b"LOCAL\n") + len(b"LOCAL\n")
    for place in range(start, len(whole)):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << int(rng.integers(8))
        path.write_bytes(damaged)
        try:
            values = read_meta_image(path)[0].values
        except ValueError:
            continue
        np.testing.assert_array_equal(values, VALUES)
