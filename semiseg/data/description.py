"""What a trained network must remember of its dataset to be used without it."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from semiseg.atomic import write_json
from semiseg.data.preprocessing import Intensity, Preprocessing

if TYPE_CHECKING:
    from semiseg.data.dataset import Dataset

OF_ONE_CHANNEL = {"intensity": "kind", "clip": "clip", "mean": "mean", "deviation": "deviation"}


@dataclass(frozen=True)
class DatasetDescription:
    """Names of the classes, and how scans were prepared."""

    class_names: tuple[str, ...]  # background first
    dimensions: int  # 2: slice by slice
    preprocessing: Preprocessing
    label_values: tuple[int, ...] | None = None  # of the classes in files of labels; None: their numbers

    @classmethod
    def of(cls, dataset: Dataset) -> DatasetDescription:
        """What there is to remember of a dataset."""
        return cls(dataset.class_names, dataset.dimensions, dataset.preprocessing, dataset.label_values)

    def difference(self, other: DatasetDescription) -> str:
        """The first field in which another dataset's cases differ, what it was and is; empty where none does."""
        given = other._fields()
        for name, value in self._fields().items():
            # Without an orientation, as older versions described the left atrium, axes are those of any file.
            if given[name] != value and not (name == "orientation" and value is None):
                return f"{name} was {value!r} and is {given[name]!r}"
        return ""

    def _fields(self) -> dict[str, Any]:
        fields = dataclasses.asdict(self)
        del fields["label_values"]  # cases hold the classes' numbers
        preprocessing = fields.pop("preprocessing")
        return {**fields, "number of channels": len(preprocessing["channels"]), **preprocessing}

    def save(self, path: Path) -> None:
        """Write JSON."""
        write_json(path, dataclasses.asdict(self))

    @classmethod
    def load(cls, path: Path) -> DatasetDescription:
        """Read what `save` wrote, perhaps edited since. FileNotFoundError where there is none, ValueError where it
        cannot be read or a field is none of a dataset's."""
        if not path.is_file():
            raise FileNotFoundError(f"{path}: missing; the run was not trained, or by an older version")
        try:
            values = json.loads(path.read_text())
            fields = {key: _as_tuple(value) for key, value in values.items()}
            description = cls(
                fields["class_names"],
                fields["dimensions"],
                _preprocessing(values["preprocessing"]),
                fields.get("label_values"),
            )
            description._check()
            return description
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"{path}: no description of a dataset ({error})") from None

    def _check(self) -> None:
        """Raise ValueError, naming the field, where one is what no dataset has."""
        names, values, preprocessing = self.class_names, self.label_values, self.preprocessing
        are_names = isinstance(names, tuple) and all(isinstance(name, str) for name in names)
        are_different = are_names and len(set(names)) == len(names) > 1
        _require("class_names", names, are_different, "two different names or more, background first")
        _require("dimensions", self.dimensions, self.dimensions in (2, 3), "2 or 3")
        if values is not None:
            are_integers = isinstance(values, tuple) and all(type(value) is int for value in values)
            _require(
                "label_values",
                values,
                are_integers and len(set(values)) == len(values) == len(names) and 0 <= min(values) <= max(values) < 2**16,
                "a different integer from 0 to 65535 for each class",
            )
        orientation, spacing = preprocessing.orientation, preprocessing.spacing
        if orientation is not None:
            axes = sorted(axis for code in str(orientation) for axis in ("AP", "IS", "LR") if code in axis)
            _require("orientation", orientation, axes == ["AP", "IS", "LR"], "three letters such as RAS")
        if spacing is not None:
            _require("spacing", spacing, _is_spacing(spacing), "three positive numbers of mm, null where a scan's own stays")
        _require("channels", preprocessing.channels, len(preprocessing.channels) > 0, "one or more")
        for channel in preprocessing.channels:
            clip, mean, deviation = channel.clip, channel.mean, channel.deviation
            if clip is not None:
                _require("clip", clip, _are_numbers(clip, 2) and clip[0] < clip[1], "two numbers, the lower first")
            if mean is not None and deviation is not None:
                _require("mean", mean, _are_numbers((mean,), 1), "a number")
                _require("deviation", deviation, _are_numbers((deviation,), 1) and deviation > 0, "a positive number")


def _preprocessing(values: Mapping[str, Any]) -> Preprocessing:
    fields = {key: _as_tuple(value) for key, value in values.items()}
    if "channels" in fields:
        channels = fields.pop("channels")
    else:  # older versions knew one channel
        channels = [{new: fields.pop(old) for old, new in OF_ONE_CHANNEL.items() if old in fields}]
    intensities = [Intensity(**{key: _as_tuple(value) for key, value in channel.items()}) for channel in channels]
    return Preprocessing(**fields, channels=tuple(intensities))


def _as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _is_spacing(spacing: Any) -> bool:
    if not isinstance(spacing, tuple) or len(spacing) != 3:
        return False
    given = tuple(size for size in spacing if size is not None)
    return _are_numbers(given, len(given)) and all(size > 0 for size in given)


def _are_numbers(values: Any, count: int) -> bool:
    return (
        isinstance(values, tuple)
        and len(values) == count
        and all(isinstance(value, int | float) and math.isfinite(value) for value in values)
    )


def _require(field: str, value: Any, is_sound: bool, accepted: str) -> None:
    if not is_sound:
        raise ValueError(f"{field} is {value!r}, accepted is {accepted}")
