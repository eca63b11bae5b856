"""Datasets of whole volumes: one HDF5 file a case, a training list and a test list."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from semiseg.data.case import Case, UnlabelledCase
from semiseg.data.files import check_labelled, read_case, read_cases_lazily, read_list
from semiseg.data.preprocessing import Preprocessing

TRAINING_LIST, VALIDATION_LIST, TEST_LIST = "train.list", "val.list", "test.list"


class Volumes(ABC):
    """`root` holds the file `path(name)` of every case, `train.list` and `test.list`."""

    class_names: tuple[str, ...]
    spacing: tuple[float, ...]  # mm; the files do not carry it
    preprocessing: Preprocessing
    dimensions = 3
    label_values: tuple[int, ...] | None = None
    has_validation = False
    evaluation_lists: Mapping[str, str] = {"test": TEST_LIST}  # by split

    def __init__(self, root: Path) -> None:
        self.root = root

    @abstractmethod
    def path(self, name: str) -> Path:
        """Where the case `name` lies."""

    def training_cases(self, labelled: int) -> tuple[list[Case], Sequence[Case | UnlabelledCase]]:
        """Read all training volumes; the first `labelled` of train.list are labelled."""
        source = self.root / TRAINING_LIST
        names = read_list(source)
        check_labelled(labelled, len(names), "volumes", source)
        cases = [self.read(name) for name in names]
        return cases[:labelled], cases[labelled:]

    def read(self, name: str) -> Case:
        """Read a case with its label."""
        return read_case(self.path(name), name, self.dimensions, len(self.class_names), self.spacing)

    def evaluation_cases(self, split: str) -> Iterator[Case]:
        """Yield the volumes of a split's list one at a time."""
        if split not in self.evaluation_lists:
            accepted = " and ".join(map(repr, self.evaluation_lists))
            raise ValueError(f"split is {split!r}; {type(self).__name__} has {accepted} only")
        names = read_list(self.root / self.evaluation_lists[split])
        paths = [self.path(name) for name in names]
        return read_cases_lazily(paths, names, self.dimensions, len(self.class_names), self.spacing)
