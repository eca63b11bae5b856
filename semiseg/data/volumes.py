"""Datasets on disk: one HDF5 file a case, a training list and lists of volumes to evaluate on."""

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path

from semiseg.data.case import Case, UnlabelledCase
from semiseg.data.files import check_evaluation_lists, check_labelled, read_case, read_cases_lazily, read_list
from semiseg.data.preprocessing import Preprocessing

TRAINING_LIST, VALIDATION_LIST, TEST_LIST = "train.list", "val.list", "test.list"


class Volumes(ABC):
    """`root` holds the file `path(name)` of every volume, the training list and those of `evaluation_lists`."""

    class_names: tuple[str, ...]
    spacing: tuple[float, ...] | None  # mm; the files do not carry it
    preprocessing: Preprocessing
    dimensions = 3  # of what is trained on
    label_values: tuple[int, ...] | None = None
    has_validation = False
    training_list = TRAINING_LIST
    evaluation_lists: Mapping[str, str] = {"test": TEST_LIST}  # by split

    def __init__(self, root: Path) -> None:
        self.root = root

    @property
    def channels(self) -> int:
        """Of an image."""
        return len(self.preprocessing.channels)

    @abstractmethod
    def path(self, name: str) -> Path:
        """Where the volume `name` lies."""

    def patient(self, name: str) -> str:
        """Names tell no patients: every case counts as another's."""
        return name

    def training_cases(self, labelled: int) -> tuple[list[Case], Sequence[Case | UnlabelledCase]]:
        """Read all training volumes; the first `labelled` of train.list are labelled."""
        names = self.training_names()
        check_labelled(labelled, len(names), "volumes", self.root / TRAINING_LIST)
        cases = [self.read(name) for name in names]
        return cases[:labelled], cases[labelled:]

    def training_names(self) -> list[str]:
        """The names of the training list. ValueError where a patient is in two lists, FileNotFoundError where what is
        to be evaluated is missing."""
        names = read_list(self.root / self.training_list)
        lists = (self.root / name for name in self.evaluation_lists.values())
        check_evaluation_lists(lists, self.path, names, self.patient)
        return names

    def read(self, name: str) -> Case:
        """Read a volume with its label."""
        return read_case(self.path(name), name, 3, len(self.class_names), self.spacing, self.channels)

    def evaluation_names(self, split: str) -> list[str]:
        """The names of a split's list."""
        if split not in self.evaluation_lists:
            accepted = " and ".join(map(repr, self.evaluation_lists))
            raise ValueError(f"split is {split!r}; {type(self).__name__} has {accepted} only")
        return read_list(self.root / self.evaluation_lists[split])

    def evaluation_cases(self, split: str, only: Collection[str] | None = None) -> Iterator[Case]:
        """Yield the volumes of a split's list, or only those of some names, one at a time."""
        names = [name for name in self.evaluation_names(split) if only is None or name in only]
        return read_cases_lazily(self.path, names, 3, len(self.class_names), self.spacing, self.channels)
