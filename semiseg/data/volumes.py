"""Datasets of whole volumes: one HDF5 file a case, a training list and a test list."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path

from semiseg.data.case import Case
from semiseg.data.files import check_labelled, read_case, read_cases_lazily, read_list
from semiseg.data.preprocessing import Preprocessing


class Volumes(ABC):
    """`root` holds the file `path(name)` of every case, `train.list` and `test.list`."""

    class_names: tuple[str, ...]
    spacing: tuple[float, float, float]  # mm; the files do not carry it
    preprocessing: Preprocessing
    dimensions = 3
    has_validation = False

    def __init__(self, root: Path) -> None:
        self.root = root

    @abstractmethod
    def path(self, name: str) -> Path:
        """Where the case `name` lies."""

    def training_cases(self, labelled: int) -> tuple[list[Case], list[Case]]:
        """Read all training volumes; the first `labelled` of train.list are labelled."""
        source = self.root / "train.list"
        names = read_list(source)
        check_labelled(labelled, len(names), "volumes", source)
        cases = [read_case(self.path(name), name, 3, len(self.class_names), self.spacing) for name in names]
        return cases[:labelled], cases[labelled:]

    def evaluation_cases(self, split: str) -> Iterator[Case]:
        """Yield the volumes of test.list one at a time; `split` must be "test"."""
        if split != "test":
            raise ValueError(f"split is {split!r}; {type(self).__name__} has 'test' only")
        names = read_list(self.root / "test.list")
        return read_cases_lazily(
            [self.path(name) for name in names], names, 3, len(self.class_names), self.spacing
        )
