"""Pictures: what their pixels are, how they lie, and what is refused."""

import re
import zlib

import numpy as np
import pytest
from PIL import Image

from semiseg.preparation.file_names import PICTURE_ENDINGS
from semiseg.preparation.pictures import read_picture, read_picture_header, read_picture_label, write_picture

RNG = np.random.default_rng(0)
GREY = RNG.integers(0, 256, (4, 6)).astype(np.uint8)  # rows, columns
COLOURS = RNG.integers(0, 256, (4, 6, 3)).astype(np.uint8)
LABELS = RNG.integers(0, 3, (4, 6)).astype(np.uint8)
LOSSLESS = (".png", ".bmp", ".tif")
READERS = (read_picture, read_picture_header, read_picture_label)
ORIENTATION = 0x0112  # of EXIF


def shown(volume) -> np.ndarray:  # [rows, columns]
    (picture,) = volume.turned(volume.slice_orientation).values
    return picture


def check(path, channels):
    """That a picture has these channels, as both functions tell."""
    volumes, headers = read_picture(path), read_picture_header(path)
    assert len(volumes) == len(headers) == len(channels)
    for volume, header, channel in zip(volumes, headers, channels, strict=True):
        np.testing.assert_array_equal(volume.values, channel.T[:, :, None])
        np.testing.assert_array_equal(shown(volume), channel)
        assert header.values.shape == volume.values.shape and not any(header.values.strides)
        assert volume.path == header.path == path
        assert volume.slice_orientation == header.slice_orientation == "SPL"
        np.testing.assert_array_equal(volume.affine, header.affine)
        assert volume.spacing == (1, 1, 1) and volume.values.flags.writeable


def palette_image(labels: np.ndarray) -> Image.Image:
    """Class 1 is red, class 2 is green."""
    image = Image.fromarray(labels).convert("P")
    image.putdata(labels.ravel().tolist())
    image.putpalette([0, 0, 0, 255, 0, 0, 0, 255, 0])
    return image


def refused(message: str):
    return pytest.raises(ValueError, match=rf"^\S*: cannot be read as a picture\b.*{message}[^\n]*$")


@pytest.mark.parametrize("ending", LOSSLESS)
def test_grey_and_colours(tmp_path, ending):
    path = tmp_path / f"picture{ending}"
    Image.fromarray(GREY).save(path)
    check(path, [GREY])
    assert read_picture(path)[0].values.dtype == np.uint8
    Image.fromarray(COLOURS).save(path)
    check(path, np.moveaxis(COLOURS, -1, 0))


@pytest.mark.parametrize("ending", LOSSLESS)
def test_one_bit(tmp_path, ending):
    path = tmp_path / f"picture{ending}"
    Image.fromarray(LABELS > 0).save(path)
    check(path, [LABELS > 0])
    assert read_picture(path)[0].values.dtype == np.uint8
    np.testing.assert_array_equal(shown(read_picture_label(path)), LABELS > 0)


@pytest.mark.parametrize("ending, dtype", [(".png", "u2"), (".tif", "u2"), (".tif", "i4"), (".tif", "f4")])
def test_deep_grey(tmp_path, ending, dtype):
    path, values = tmp_path / f"picture{ending}", (GREY.astype(dtype) - 20) * 257
    Image.fromarray(values).save(path)
    check(path, [values])
    assert read_picture(path)[0].values.dtype == values.dtype
    np.testing.assert_array_equal(shown(read_picture_label(path)), values)


@pytest.mark.parametrize("dtype", ["<u2", ">u2", "<i2", ">i2", "<i4", ">i4", "<u4", "<f4", ">f4"])
def test_every_deep_tiff(tmp_path, dtype):
    tifffile = pytest.importorskip("tifffile")
    path = tmp_path / "picture.tif"
    values = np.linspace(0, 1, 24).reshape(4, 6)
    values = (values if dtype[1] == "f" else values * np.iinfo(dtype).max).astype(dtype)
    tifffile.imwrite(path, values, byteorder=dtype[0], photometric="minisblack")
    check(path, [values])
    tifffile.imwrite(path, values, byteorder=dtype[0], photometric="minisblack", compression="zlib")
    try:
        check(path, [values])
    except ValueError as error:
        assert dtype in (">i2", ">i4", ">f4")
        assert "it is compressed and big-endian, which Pillow misreads; expected little-endian" in str(error)


def test_photographs(tmp_path):
    """JPEG only comes close."""
    rows, columns = np.mgrid[:40, :60]
    picture = np.stack([rows * 5, columns * 4, rows + columns], axis=-1).astype(np.uint8)
    for path in (tmp_path / "picture.jpg", tmp_path / "picture.JPEG"):
        Image.fromarray(picture).save(path, quality=95)
        channels = read_picture(path)
        assert len(channels) == len(read_picture_header(path)) == 3
        for number, channel in enumerate(channels):
            np.testing.assert_allclose(shown(channel), picture[..., number], atol=12)
    Image.fromarray(picture[..., 0]).save(path)
    assert len(read_picture(path)) == len(read_picture_header(path)) == 1


@pytest.mark.parametrize("ending", [".png", ".jpg", ".tif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_are_turned_as_exif_says(tmp_path, ending, orientation):
    path = tmp_path / f"picture{ending}"
    stored = np.zeros((16, 32), np.uint8)
    stored[:8, :8] = 250  # one block of JPEG
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    Image.fromarray(stored).save(path, exif=exif)
    # What the first row and the first column of the file are of the picture, as the standard has it.
    expected = {
        1: stored,
        2: stored[:, ::-1],
        3: stored[::-1, ::-1],
        4: stored[::-1],
        5: stored.T,
        6: stored.T[:, ::-1],
        7: stored.T[::-1, ::-1],
        8: stored.T[::-1],
    }[orientation]
    (volume,), (header,) = read_picture(path), read_picture_header(path)
    np.testing.assert_allclose(shown(volume), expected, atol=2)
    np.testing.assert_allclose(shown(read_picture_label(path)), expected, atol=2)
    assert header.values.shape == volume.values.shape


@pytest.mark.parametrize("ending", [".png", ".tif"])
def test_palettes_are_turned(tmp_path, ending):
    path = tmp_path / f"picture{ending}"
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    palette_image(LABELS).save(path, exif=exif)
    turned = LABELS.T[:, ::-1]
    check(path, [(turned == 1) * np.uint8(255), (turned == 2) * np.uint8(255), turned * np.uint8(0)])
    np.testing.assert_array_equal(shown(read_picture_label(path)), turned)


@pytest.mark.parametrize("ending", [".png", ".tif"])
def test_alpha_is_dropped_where_all_is_opaque(tmp_path, ending):
    path, alpha = tmp_path / f"picture{ending}", np.full((4, 6, 1), 255, np.uint8)
    Image.fromarray(np.concatenate([COLOURS, alpha], axis=-1)).save(path)
    check(path, np.moveaxis(COLOURS, -1, 0))
    Image.fromarray(np.concatenate([GREY[..., None], alpha], axis=-1)).save(path)
    check(path, [GREY])
    np.testing.assert_array_equal(shown(read_picture_label(path)), GREY)
    alpha[2, 3] = 254
    for pixels in (COLOURS, GREY[..., None]):
        Image.fromarray(np.concatenate([pixels, alpha], axis=-1)).save(path)
        assert len(read_picture_header(path)) == pixels.shape[-1]
        for read in (read_picture, read_picture_label):
            with refused("it has transparent pixels; expected opaque ones"):
                read(path)


@pytest.mark.parametrize("ending", LOSSLESS)
def test_palettes_are_colours_of_a_picture_and_numbers_of_a_mask(tmp_path, ending):
    path = tmp_path / f"picture{ending}"
    palette_image(LABELS).save(path)
    check(path, [(LABELS == 1) * np.uint8(255), (LABELS == 2) * np.uint8(255), LABELS * np.uint8(0)])
    np.testing.assert_array_equal(shown(read_picture_label(path)), LABELS)
    assert read_picture_label(path).values.dtype == np.uint8


def test_a_transparent_entry_of_a_palette(tmp_path):
    path = tmp_path / "picture.png"
    palette_image(LABELS).save(path, transparency=0)
    np.testing.assert_array_equal(shown(read_picture_label(path)), LABELS)
    with refused("it has transparent pixels; expected opaque ones"):
        read_picture(path)
    palette_image(np.maximum(LABELS, 1)).save(path, transparency=0)
    assert len(read_picture(path)) == 3


@pytest.mark.parametrize("ending", LOSSLESS)
def test_masks_of_numbers(tmp_path, ending):
    path = tmp_path / f"mask{ending}"
    for pixels in (LABELS, np.stack([LABELS] * 3, axis=-1)):
        Image.fromarray(pixels).save(path)
        label = read_picture_label(path)
        np.testing.assert_array_equal(label.values, LABELS.T[:, :, None])
        np.testing.assert_array_equal(label.affine, read_picture(path)[0].affine)
        assert label.path == path


def test_masks_of_colours_are_refused(tmp_path):
    path = tmp_path / "mask.png"
    palette_image(LABELS).convert("RGB").save(path)
    with refused("it has 3 colours; expected a number for each class: grey values, or a palette"):
        read_picture_label(path)


def test_masks_in_jpeg(tmp_path):
    path = tmp_path / "mask.jpg"
    mask = np.zeros((64, 64), np.uint8)
    mask[:32, :32] = 255  # along blocks: nothing is made up
    for pixels in (mask, np.stack([mask] * 3, axis=-1)):
        Image.fromarray(pixels).save(path)
        np.testing.assert_array_equal(shown(read_picture_label(path)), mask)
    y, x = np.mgrid[:64, :64]
    disc = ((y - 30) ** 2 + (x - 30) ** 2 < 200) * np.uint8(255)
    Image.fromarray(disc).save(path, quality=100)
    with refused(r"it is a JPEG of \d+ different values"):  # around 0 and 255
        read_picture_label(path)
    spots = (RNG.random((64, 64)) < 0.1).astype(np.uint8)
    for pixels in (spots * np.uint8(255), spots[..., None] * np.uint8([0, 255, 0])):
        Image.fromarray(pixels).save(path, quality=60)
        with refused(
            r"it is a JPEG of \d+ different values; expected a mask in a lossless format, such as PNG"
        ):
            read_picture_label(path)


def test_masks_whose_zero_is_white(tmp_path):
    tifffile = pytest.importorskip("tifffile")
    path = tmp_path / "mask.tif"
    tifffile.imwrite(path, LABELS, photometric="miniswhite")
    with refused("its 0 is white, which programs read differently; expected a TIFF whose 0 is black, or PNG"):
        read_picture_label(path)
    tifffile.imwrite(path, LABELS.astype(np.uint16), photometric="miniswhite")  # inverted by none
    np.testing.assert_array_equal(shown(read_picture_label(path)), LABELS)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_what_is_written_lies_as_what_it_was_predicted_from(tmp_path, dtype):
    picture, path = tmp_path / "picture.tif", tmp_path / "labels.PNG"
    Image.fromarray(GREY).save(picture)
    (image,) = read_picture(picture)
    labels = image.values.astype(dtype) * dtype(np.iinfo(dtype).max // 255)
    write_picture(path, labels)
    label = read_picture_label(path)
    np.testing.assert_array_equal(label.values, labels)
    np.testing.assert_array_equal(label.affine, image.affine)
    assert label.values.dtype == dtype
    assert sorted(tmp_path.iterdir()) == [path, picture]


def test_what_fails_to_be_written_leaves_nothing(tmp_path):
    labels = LABELS.T[:, :, None]
    with pytest.raises(ValueError, match="labels.jpg: accepted are names that end in .png"):
        write_picture(tmp_path / "labels.jpg", labels)
    with pytest.raises(OSError, match="cannot write .*labels.png"):
        write_picture(tmp_path / "none" / "labels.png", labels)
    assert not list(tmp_path.iterdir())


def test_several_pictures_in_one_file(tmp_path):
    pages = [Image.fromarray(np.full((4, 6), value, np.uint8)) for value in (1, 2, 3)]
    pages[0].save(tmp_path / "stack.tif", save_all=True, append_images=pages[1:])
    for read in READERS:
        with refused("it has 3 pages; expected one"):
            read(tmp_path / "stack.tif")
    pages[0].save(tmp_path / "camera.jpg", "MPO", save_all=True, append_images=pages[1:])
    check(tmp_path / "camera.jpg", [np.asarray(pages[0])])


def test_colours_of_16_bits(tmp_path):
    tifffile = pytest.importorskip("tifffile")
    path, deep = tmp_path / "picture.tif", COLOURS.astype(np.uint16) * 257
    for options in ({}, {"compression": "zlib"}, {"planarconfig": "separate"}):
        pixels = np.moveaxis(deep, -1, 0) if "planarconfig" in options else deep
        tifffile.imwrite(path, pixels, photometric="rgb", **options)
        for read in READERS:
            with refused("its colours have 16 bits each; expected 8"):
                read(path)
    path.write_bytes(deep_png(deep))
    for read in READERS:
        with refused("its colours have 16 bits each; expected 8"):
            read(path)


def deep_png(pixels: np.ndarray) -> bytes:  # [rows, columns, 3] uint16
    rows, columns, _ = pixels.shape
    lines = b"".join(b"\0" + line.astype(">u2").tobytes() for line in pixels)
    header = columns.to_bytes(4, "big") + rows.to_bytes(4, "big") + bytes([16, 2, 0, 0, 0])
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(lines)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        len(data).to_bytes(4, "big") + name + data + zlib.crc32(name + data).to_bytes(4, "big")
        for name, data in chunks
    )


@pytest.mark.parametrize("read", READERS)
def test_other_colours(tmp_path, read):
    for name in ("picture.jpg", "picture.tif"):
        Image.fromarray(COLOURS).convert("CMYK").save(tmp_path / name)
        with refused("its pixels are CMYK; expected grey, RGB or a palette"):
            read(tmp_path / name)


@pytest.mark.parametrize("read", READERS)
@pytest.mark.parametrize("ending", PICTURE_ENDINGS)
def test_files_that_are_missing_or_of_another_kind(tmp_path, read, ending):
    path = tmp_path / f"picture{ending}"
    for missing in (path, tmp_path):
        with pytest.raises(FileNotFoundError, match=rf"^{missing}: missing; expected a picture$"):
            read(missing)
    for data in (b"", b"patient,age\n1,70\n", RNG.bytes(1000)):
        path.write_bytes(data)
        with refused("it is no PNG, JPEG, BMP, TIFF of a kind that Pillow knows"):
            read(path)
    Image.fromarray(GREY).save(path, "GIF")
    with refused("it is no PNG, JPEG, BMP, TIFF of a kind that Pillow knows"):
        read(path)


@pytest.mark.parametrize("read", READERS)
@pytest.mark.parametrize("side", [10_000, 20_000])  # of which Pillow warns, and which it refuses
def test_decompression_bombs(tmp_path, read, side):
    path = tmp_path / "picture.png"
    Image.new("1", (side, side)).save(path)
    with refused("could be decompression bomb"):
        read(path)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("ending", PICTURE_ENDINGS)
def test_cut_files(tmp_path, ending):
    path = tmp_path / f"picture{ending}"
    Image.fromarray(np.tile(GREY, (5, 5))).save(path)
    whole = path.read_bytes()
    expected = read_picture(path)[0].values
    for length in range(0, len(whole), 7):
        path.write_bytes(whole[:length])
        for read in (read_picture, read_picture_label):
            try:
                read(path)
            except ValueError as error:
                assert re.match(rf"{path}: [^\n]+$", str(error))
            else:  # what is cut off is none of the pixels
                np.testing.assert_array_equal(read_picture(path)[0].values, expected)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("ending", PICTURE_ENDINGS)
def test_damaged_files_are_read_or_refused(tmp_path, ending):
    """And those of PNG, which has checksums, never read wrongly."""
    path = tmp_path / f"picture{ending}"
    Image.fromarray(LABELS).save(path)
    whole, expected = path.read_bytes(), read_picture(path)[0].values
    for place in range(0, len(whole), 1 if ending == ".png" else 5):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << int(RNG.integers(8))
        path.write_bytes(damaged)
        for read in READERS:
            try:
                read(path)
            except ValueError as error:
                assert re.match(rf"{path}: [^\n]+$", str(error))
            else:
                if ending == ".png" and read is read_picture:
                    np.testing.assert_array_equal(read(path)[0].values, expected)
