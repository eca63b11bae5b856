"""Pictures, PNG, JPEG, BMP and TIFF, read as volumes of one slice; masks written as PNG."""

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageFile, ImageOps, UnidentifiedImageError
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import BITSPERSAMPLE, PHOTOMETRIC_INTERPRETATION, SAMPLEFORMAT, TiffImageFile

from semiseg.atomic import replace_atomically
from semiseg.errors import first_line
from semiseg.preparation.file_names import has_ending
from semiseg.preparation.volume import Volume

FORMATS = ("PNG", "JPEG", "BMP", "TIFF")
LOSSY = ("JPEG", "MPO")  # the other is JPEG of some cameras, with further pictures behind the first
# Colours of each of Pillow's modes that is accepted, without alpha.
CHANNELS = {"1": 1, "L": 1, "LA": 1, "I;16": 1, "I;16B": 1, "I": 1, "F": 1, "P": 3, "RGB": 3, "RGBA": 3}
INVERTED = ("1", "L")  # by Pillow, where a TIFF says that 0 is white
WITH_ALPHA = ("LA", "RGBA")
TURNED = range(5, 9)  # orientations of EXIF that swap columns and rows
# Pixels of 1 mm; columns lead to the left and rows to posterior, as radiology shows axial slices.
AFFINE = np.diag([-1.0, -1.0, 1.0, 1.0])
MOST_VALUES = 2  # of a lossy mask: where there are more, compression may have made them up, at 0 and 255 by few


def read_picture(path: Path) -> list[Volume]:
    """Read a picture, turned as EXIF says: a volume [columns, rows, 1] for each colour, one of grey, three of a palette.

    Alpha is dropped where all pixels are opaque; what others hide was not meant to be seen. Raises FileNotFoundError
    if it is missing, ValueError if it cannot be read, has transparent pixels, colours other than grey or RGB, or of 16
    bits, of which Pillow keeps 8, or is a TIFF of several pages.
    """
    with _checked(path) as image:
        if image.mode == "P":
            image = image.convert("RGBA" if image.has_transparency_data else "RGB")
        return [_volume(path, channel) for channel in _channels(image)]


def read_picture_header(path: Path) -> list[Volume]:
    """Where a picture places its pixels; all of them are 0 here, and take no memory.

    Raises as `read_picture` does, as far as can be told without the pixels.
    """
    with _opened(path) as image:
        # Pillow turns TIFF when it opens it. What PNG says behind its pixels, if anything, only decoding would find.
        orientation = Image.Image.getexif(image).get(ExifTags.Base.Orientation)
        turned = orientation in TURNED and not isinstance(image, TiffImageFile)
        columns, rows = reversed(image.size) if turned else image.size
        pixels = np.broadcast_to(np.uint8(0), (rows, columns))
        return [_volume(path, pixels)] * CHANNELS[image.mode]


def read_picture_label(path: Path) -> Volume:
    """Read a mask [columns, rows, 1]: grey values, indices of a palette, 0 and 1 of one bit, or colours that are grey.

    Raises as `read_picture` does, and ValueError for other colours, for a JPEG of more than two values, and
    for a TIFF whose 0 is white: Pillow inverts its values, other programs do not.
    """
    with _checked(path) as image:
        if image.mode in INVERTED and _tag(image, PHOTOMETRIC_INTERPRETATION, 1) == 0:
            raise ValueError(
                "its 0 is white, which programs read differently; expected a TIFF whose 0 is black, or PNG"
            )
        channels = _channels(image)
        values = max(len(np.unique(channel)) for channel in channels)
        if image.format in LOSSY and values > MOST_VALUES:
            raise ValueError(
                f"it is a JPEG of {values} different values; expected a mask in a lossless format, such as PNG"
            )
        if any((channel != channels[0]).any() for channel in channels[1:]):
            colours = np.unique(np.stack(channels).reshape(len(channels), -1), axis=1)
            raise ValueError(
                f"it has {colours.shape[1]} colours; expected a number for each class: grey values, or a palette"
            )
        return _volume(path, channels[0])


def write_picture(
    path: Path,  # .png
    labels: np.ndarray,  # [columns, rows, 1] uint8 or uint16
) -> None:
    """Write a mask as PNG of grey values; it appears whole or not at all. ValueError for another ending."""
    if not has_ending(path, (".png",)):
        raise ValueError(f"{path}: accepted are names that end in .png")
    with replace_atomically(path) as temporary:
        Image.fromarray(np.ascontiguousarray(labels[:, :, 0].T)).save(temporary, "PNG")


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    """An accepted picture whose pixels are still to be read; what is raised meanwhile becomes one ValueError."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: missing; expected a picture")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            # Of a path, Pillow maps the file into memory, and then garbles a TIFF that is to be turned.
            with path.open("rb") as stream, Image.open(stream, formats=FORMATS) as image:
                if image.mode not in CHANNELS:
                    raise ValueError(f"its pixels are {image.mode}; expected grey, RGB or a palette")
                if CHANNELS[image.mode] > 1 and _bits(image) > 8:
                    raise ValueError(f"its colours have {_bits(image)} bits each; expected 8")
                if isinstance(image, TiffImageFile) and image.n_frames > 1:
                    raise ValueError(f"it has {image.n_frames} pages; expected one")
                if _is_misread(image):
                    raise ValueError(
                        "it is compressed and big-endian, which Pillow misreads; expected little-endian"
                    )
                yield image
    except UnidentifiedImageError as error:
        raise ValueError(
            f"{path}: cannot be read as a picture (it is no {', '.join(FORMATS)} of a kind that Pillow knows)"
        ) from error
    except Exception as error:  # of damaged files Pillow raises nearly everything there is
        raise ValueError(f"{path}: cannot be read as a picture ({first_line(error)})") from error


@contextmanager
def _checked(path: Path) -> Iterator[Image.Image]:
    """The same of a picture that agrees with its checksums, which only PNG has; its decoder may stop before them."""
    with _opened(path) as image:
        with Image.open(path, formats=FORMATS) as other:
            other.verify()
        yield image


def _channels(image: Image.Image) -> list[np.ndarray]:  # [rows, columns] each
    bands = ImageOps.exif_transpose(image).split()
    channels = [np.array(band, np.uint8 if image.mode == "1" else None) for band in bands]
    if image.mode in WITH_ALPHA and channels.pop().min() < 255:
        raise ValueError("it has transparent pixels; expected opaque ones")
    if image.mode == "I" and _tag(image, SAMPLEFORMAT, 1) == 1:
        channels = [channel.view(np.uint32) for channel in channels]  # Pillow knows only signed ones
    return channels


def _is_misread(image: ImageFile.ImageFile) -> bool:
    """Whether Pillow swaps the bytes of numbers that libtiff has swapped before."""
    return any(
        tile.codec_name == "libtiff" and re.search(r"[IF];\d+B", str(tile.args)) for tile in image.tile
    )


def _bits(image: Image.Image) -> int:
    """How many bits a file has for each colour of a pixel; Pillow reads colours of 16 as such of 8."""
    if isinstance(image, PngImageFile):
        return 16 if ";16" in str(image.tile[0].args) else 8
    return _tag(image, BITSPERSAMPLE, 8)


def _tag(image: Image.Image, number: int, otherwise: int) -> int:
    """The largest number in a field of TIFF; of other formats, and where it is missing, this one."""
    return int(np.max(image.tag_v2.get(number, otherwise))) if isinstance(image, TiffImageFile) else otherwise


def _volume(path: Path, pixels: np.ndarray) -> Volume:  # [rows, columns]
    return Volume(path, pixels.T[:, :, None], AFFINE)
