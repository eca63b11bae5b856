"""MetaImage files (.mha, and .mhd with a file of voxels beside it), read and written with their place in space.

Without SimpleITK: where compressed voxels are damaged it returns whatever the memory held, and raises nothing.
"""

import re
import zlib
from collections.abc import Iterable, Mapping
from math import prod
from pathlib import Path
from typing import BinaryIO

import numpy as np

from semiseg.atomic import replace_atomically
from semiseg.errors import reading
from semiseg.preparation.file_names import has_ending
from semiseg.preparation.volume import Volume, checked_volume

ELEMENT_TYPES = {
    "MET_CHAR": "i1", "MET_UCHAR": "u1", "MET_SHORT": "i2", "MET_USHORT": "u2",
    "MET_LONG": "i4", "MET_ULONG": "u4", "MET_INT": "i4", "MET_UINT": "u4",
    "MET_LONG_LONG": "i8", "MET_ULONG_LONG": "u8", "MET_FLOAT": "f4", "MET_DOUBLE": "f8",
}  # fmt: skip
FIELD = re.compile(r"\s*(\w+)\s*[=:]\s*(.*?)\s*")
# What ITK takes where a field is missing, and older names that it knows.
DEFAULTS = {
    "BinaryData": "True",
    "BinaryDataByteOrderMSB": "False",
    "CompressedData": "False",
    "ElementNumberOfChannels": "1",
    "ElementSize": "1 1 1",
    "Offset": "0 0 0",
    "TransformMatrix": "1 0 0 0 1 0 0 0 1",
}
OLDER_NAMES = {
    "ElementByteOrderMSB": "BinaryDataByteOrderMSB",
    "Origin": "Offset",
    "Position": "Offset",
    "Orientation": "TransformMatrix",
    "Rotation": "TransformMatrix",
}
TRUE = ("T", "t", "1")  # how it begins
LOCAL = "LOCAL"  # the file whose voxels lie behind the header
LONGEST_LINE = 2**16  # bytes: a file of another kind may have no lines
LPS = np.diag([-1, -1, 1, 1])  # the space of a header to that of an affine, and back


def read_meta_image(path: Path) -> list[Volume]:
    """Read a MetaImage of three axes, a volume for each component of its pixels.

    Raises FileNotFoundError if it is missing, ValueError if it cannot be read, has other axes or one without a direction,
    or its voxels are text or lie in several files.
    """
    with reading(path, "MetaImage"), path.open("rb") as stream:
        fields = _read_fields(stream)
        name = fields["ElementDataFile"]
        data = stream.read() if name == LOCAL else (path.parent / name).read_bytes()
        values, affine = _voxels(fields, data), _affine(fields)
    return [checked_volume(path, component, affine) for component in values]


def read_meta_image_header(path: Path) -> list[Volume]:
    """Where a MetaImage places its voxels; all of them are 0 here, and take no memory.

    Raises as `read_meta_image` does, as far as the header tells.
    """
    with reading(path, "MetaImage"), path.open("rb") as stream:
        fields = _read_fields(stream)
        values, affine = np.broadcast_to(np.uint8(0), _shape(fields)), _affine(fields)
    return [checked_volume(path, component, affine) for component in values]


def write_meta_image(
    path: Path,  # .mha
    values: np.ndarray,  # [x, y, z], or [x, y, z, C]
    affine: np.ndarray,  # [4, 4]
) -> None:
    """Write a compressed MetaImage; it appears whole or not at all. ValueError for another ending."""
    if not has_ending(path, (".mha",)):
        raise ValueError(f"{path}: accepted are names that end in .mha")
    components = np.moveaxis(values.reshape(*values.shape[:3], -1), -1, 0)
    data = zlib.compress(components.astype(values.dtype.newbyteorder("<")).tobytes(order="F"))
    placed = LPS @ affine
    spacing = np.linalg.norm(placed[:3, :3], axis=0)
    names = {kind: name for name, kind in ELEMENT_TYPES.items()}
    fields = {
        "ObjectType": "Image",
        "NDims": 3,
        "BinaryData": True,
        "BinaryDataByteOrderMSB": False,
        "CompressedData": True,
        "CompressedDataSize": len(data),
        "TransformMatrix": _text((placed[:3, :3] / spacing).T.ravel()),
        "Offset": _text(placed[:3, 3]),
        "ElementSpacing": _text(spacing),
        "DimSize": _text(values.shape[:3]),
        "ElementNumberOfChannels": len(components),
        "ElementType": names[values.dtype.str[1:]],
        "ElementDataFile": LOCAL,
    }
    header = "".join(f"{name} = {value}\n" for name, value in fields.items())
    with replace_atomically(path) as temporary:
        temporary.write_bytes(header.encode() + data)


def _read_fields(stream: BinaryIO) -> dict[str, str]:
    """The lines of a header; the stream is then where voxels of the same file begin."""
    fields = dict(DEFAULTS)
    while "ElementDataFile" not in fields:
        # Names of files need not be UTF-8.
        line = FIELD.fullmatch(stream.readline(LONGEST_LINE).decode(errors="surrogateescape"))
        if line is None:
            raise ValueError("expected lines 'Name = value', the last one of ElementDataFile")
        fields[OLDER_NAMES.get(line[1], line[1])] = line[2]
    if fields.get("ElementType") not in ELEMENT_TYPES:
        raise ValueError(
            f"its ElementType is {fields.get('ElementType', 'missing')}; expected one of {', '.join(ELEMENT_TYPES)}"
        )
    if not fields["BinaryData"].startswith(TRUE):
        raise ValueError("its BinaryData is False; expected voxels that are not written as text")
    return fields


def _shape(fields: Mapping[str, str]) -> tuple[int, ...]:  # C, x, y, z
    sides = [*_numbers(fields, "ElementNumberOfChannels", 1), *_numbers(fields, "DimSize", 3)]
    if min(sides) < 1:
        raise ValueError(f"its DimSize is {fields['DimSize']}; expected sides and channels from 1 on")
    return tuple(map(int, sides))


def _affine(fields: Mapping[str, str]) -> np.ndarray:  # [4, 4]
    directions = _numbers(fields, "TransformMatrix", 9).reshape(3, 3)  # a row for each axis of the voxels
    spacing = _numbers(fields, "ElementSpacing" if "ElementSpacing" in fields else "ElementSize", 3)
    affine = np.eye(4)
    affine[:3, :3] = directions.T * spacing
    affine[:3, 3] = _numbers(fields, "Offset", 3)
    return LPS @ affine


def _voxels(fields: Mapping[str, str], data: bytes) -> np.ndarray:  # [C, x, y, z]
    shape = _shape(fields)
    order = ">" if fields["BinaryDataByteOrderMSB"].startswith(TRUE) else "<"
    stored = np.dtype(order + ELEMENT_TYPES[fields["ElementType"]])
    size, whole = prod(shape) * stored.itemsize, True
    if fields["CompressedData"].startswith(TRUE):
        stream = zlib.decompressobj(zlib.MAX_WBITS | 32)  # zlib or gzip
        data = stream.decompress(data, size + 1)
        whole = stream.eof  # where the voxels have been compared with their checksum
    if len(data) != size or not whole:
        raise ValueError(f"its voxels are not the {size} bytes that its header makes them")
    return np.frombuffer(data, stored).reshape(shape, order="F").astype(stored.newbyteorder("="))


def _numbers(fields: Mapping[str, str], name: str, count: int) -> np.ndarray:  # [count] float64
    text = fields.get(name, "missing")
    try:
        numbers = np.array(text.split(), float)
    except ValueError:
        numbers = np.empty(0)
    if len(numbers) != count or not np.isfinite(numbers).all():
        raise ValueError(f"its {name} is {text}; expected {count} finite numbers")
    return numbers


def _text(numbers: Iterable[float]) -> str:
    return " ".join(map(str, numbers))
