"""What a trained network must remember of its dataset to be used without it."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from semiseg.atomic import write_json
from semiseg.data.preprocessing import Preprocessing

if TYPE_CHECKING:
    from semiseg.data.dataset import Dataset


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
        return fields | fields.pop("preprocessing")

    def save(self, path: Path) -> None:
        """Write JSON."""
        write_json(path, dataclasses.asdict(self))

    @classmethod
    def load(cls, path: Path) -> DatasetDescription:
        """Read what `save` wrote. FileNotFoundError where there is none, ValueError where it cannot be read."""
        if not path.is_file():
            raise FileNotFoundError(f"{path}: missing; the run was not trained, or by an older version")
        try:
            values = json.loads(path.read_text())
            preprocessing: dict[str, Any] = {
                key: tuple(value) if isinstance(value, list) else value
                for key, value in values["preprocessing"].items()
            }
            names, label_values = tuple(values["class_names"]), values.get("label_values")
            if label_values is not None:
                label_values = tuple(int(value) for _, value in zip(names, label_values, strict=True))
            return cls(names, values["dimensions"], Preprocessing(**preprocessing), label_values)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"{path}: no description of a dataset ({error})") from None
