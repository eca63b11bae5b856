"""Reading lists of case names and HDF5 files with `image` and `label`, and saying what is wrong with them.

In a file `image` is [*S] where it has one channel, never [1, *S], and [M, *S] where it has M > 1; `label` is [*S]. What is
read of an image is [M, *S] always.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import h5py
import numpy as np

from semiseg.data.case import Case, UnlabelledCase


def read_list(path: Path) -> list[str]:
    """Return the case names of a list file, one per line, in order.

    Raises FileNotFoundError if the file is missing, ValueError if it is no text, empty or names a case twice.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: missing; expected a text file with one case name per line")
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path}: no text in UTF-8 ({error.reason}); expected one case name per line"
        ) from None
    names = [line.strip() for line in lines if line.strip()]
    if not names:
        raise ValueError(f"{path}: empty; expected one case name per line")
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{path}: names {twice!r} more than once; expected distinct case names")
    return names


def check_evaluation_lists(
    lists: Iterable[Path],
    file_of: Callable[[str], Path],  # a case's name
    training: Iterable[str],  # names of cases
    patient: Callable[[str], str],  # of a case's name
) -> None:
    """Raise ValueError if a patient is in two of all lists, FileNotFoundError if a case to be evaluated has no file.

    No file of a case is opened. Raises as `read_list` too.
    """
    earlier = {patient(name): f"the training list {name!r}" for name in training}
    for path in lists:
        names = read_list(path)
        for name in names:
            if patient(name) in earlier:
                raise ValueError(
                    f"{path}: names {name!r}, and {earlier[patient(name)]}; a patient may be in only one of the lists"
                )
            if not file_of(name).is_file():
                raise FileNotFoundError(f"{file_of(name)}: missing; {path} names {name!r}")
        earlier |= {patient(name): f"{path.name} {name!r}" for name in names}


def read_case(
    path: Path,
    name: str,
    axes: int,  # of the label
    num_classes: int,
    spacing: tuple[float, ...] | None = None,  # mm; None: as the file says, where it does
    channels: int = 1,  # of the image
) -> Case:
    """Read one HDF5 file into a Case.

    Raises FileNotFoundError if it is missing; ValueError if it is no HDF5 file, `image` or `label` is not in it or holds
    no numbers, the image has other channels, or in them another shape than the label, or that is not `axes` long, the
    image holds NaN or infinity, the label a value that is no class, or the file a spacing that is none.
    """
    with _open(path) as file:
        _check_arrays(path, file, axes, channels, ("image", "label"))
        image, stored_label = _read_image(path, file, channels), _read(path, file, "label")
        if spacing is None:
            spacing = _stored_spacing(path, file, axes)
    with np.errstate(invalid="ignore"):
        label = stored_label.astype(np.uint8)
    wrong = (label != stored_label) | (label >= num_classes)
    if wrong.any():
        raise ValueError(
            f"{path}: 'label' holds {stored_label[wrong][0]}; expected integers from 0 to {num_classes - 1}"
        )
    return Case(name, image, label, spacing)


def read_unlabelled_case(
    path: Path,
    name: str,
    axes: int,  # of each channel
    channels: int = 1,
) -> UnlabelledCase:
    """Read the image of one HDF5 file, whether it holds a label or not. Raises as read_case does."""
    with _open(path) as file:
        _check_arrays(path, file, axes, channels, ("image",))
        return UnlabelledCase(name, _read_image(path, file, channels))


def image_shape(
    path: Path,
    axes: int,  # of each channel
    channels: int = 1,
) -> tuple[int, ...]:
    """Shape [M, *S] of the image of one HDF5 file. Raises as read_case does, as far as the header tells."""
    with _open(path) as file:
        _check_arrays(path, file, axes, channels, ("image",))
        return (channels, *file["image"].shape[-axes:])


def read_image_box(
    path: Path,
    box: tuple[slice, ...],  # of step 1, of each channel
    channels: int = 1,
) -> np.ndarray:  # [M, *box] float32
    """Read a part of the image of one HDF5 file. Raises as read_case does."""
    with _open(path) as file:
        _check_arrays(path, file, len(box), channels, ("image",))
        return _read_image(path, file, channels, box)


def has_label(path: Path) -> bool:
    """Whether an HDF5 file holds a label. Raises FileNotFoundError if it is missing, ValueError if it is none."""
    with _open(path) as file:
        return "label" in file


def read_cases_lazily(
    file_of: Callable[[str], Path],  # a case's name
    names: Sequence[str],
    axes: int,
    num_classes: int,
    spacing: tuple[float, ...] | None = None,  # mm; None: as the files say, where they do
    channels: int = 1,  # of the images
) -> Iterator[Case]:
    """Check at once that every file opens and has the right shapes, then read one case at a time.

    Raises as read_case does.
    """
    for name in names:
        with _open(file_of(name)) as file:
            _check_arrays(file_of(name), file, axes, channels, ("image", "label"))
    return (read_case(file_of(name), name, axes, num_classes, spacing, channels) for name in names)


def check_labelled(labelled: int, available: int, unit: str, source: Path | str) -> None:
    """Raise ValueError unless 1 <= labelled <= available."""
    if not 1 <= labelled <= available:
        raise ValueError(
            f"dataset.labelled is {labelled}, accepted are 1 to {available}, the {unit} that {source} holds"
        )


def _open(path: Path) -> h5py.File:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: missing; expected an HDF5 file with 'image' and 'label'")
    try:
        return h5py.File(path, "r")
    except OSError as error:
        raise ValueError(f"{path}: cannot be read as HDF5 ({error})") from error


def _read(path: Path, file: h5py.File, key: str, box: tuple[slice, ...] = ()) -> np.ndarray:
    try:
        return file[key][(..., *box)]
    except OSError as error:
        raise ValueError(f"{path}: cannot be read as HDF5 ({error})") from error


def _read_image(path: Path, file: h5py.File, channels: int, box: tuple[slice, ...] = ()) -> np.ndarray:
    image = _read(path, file, "image", box).astype(np.float32, copy=False)
    if not np.isfinite(image).all():
        raise ValueError(f"{path}: 'image' holds NaN or infinity; expected finite float32 values")
    return image[np.newaxis] if channels == 1 else image


def _stored_spacing(path: Path, file: h5py.File, axes: int) -> tuple[float, ...] | None:
    stored = file.attrs.get("spacing")
    if stored is None:
        return None
    sizes = np.atleast_1d(stored)
    if sizes.shape != (axes,) or sizes.dtype.kind not in "iuf" or not (np.isfinite(sizes) & (sizes > 0)).all():
        raise ValueError(f"{path}: 'spacing' is {stored}; expected {axes} positive numbers of mm")
    return tuple(sizes.tolist())


def _check_arrays(path: Path, file: h5py.File, axes: int, channels: int, keys: Sequence[str]) -> None:
    expected = " and ".join(map(repr, keys))
    for key in keys:
        if file.get(key, getclass=True) is not h5py.Dataset:
            raise ValueError(f"{path}: has no dataset {key!r}; it holds {sorted(file)}, expected {expected}")
        if file[key].dtype.kind not in "biuf":
            raise ValueError(f"{path}: {key!r} holds values of type {file[key].dtype}; expected one number a voxel")
    image, *labels = (file[key].shape for key in keys)
    leading = () if channels == 1 else (channels,)
    if any(image != (*leading, *label) for label in labels):
        same = "the same shape" if channels == 1 else f"{channels} channels of the label's shape"
        raise ValueError(f"{path}: 'image' has shape {image} and 'label' {labels[0]}; expected {same}")
    if image[: len(leading)] != leading or len(image) != len(leading) + axes or 0 in image:
        form = f"{axes} axes" if channels == 1 else f"{channels} channels of {axes} axes"
        raise ValueError(f"{path}: 'image' has shape {image}; expected {form}, none of them empty")
