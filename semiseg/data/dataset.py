"""What every dataset offers, and opening one by name."""

import os
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Protocol

from semiseg.data.acdc import ACDC
from semiseg.data.case import Case, UnlabelledCase
from semiseg.data.left_atrium import LeftAtrium
from semiseg.data.own import OwnData
from semiseg.data.pancreas import Pancreas
from semiseg.data.phantom import Phantom
from semiseg.data.preprocessing import Preprocessing

ENVIRONMENT = "SEMISEG_DATA"


class Dataset(Protocol):
    """Cases to train on and cases to evaluate on. Only evaluation_cases("test") touches the test set."""

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes, background first."""
        ...

    @property
    def dimensions(self) -> int:
        """2 if trained and predicted slice by slice, 3 if volume by volume."""
        ...

    @property
    def preprocessing(self) -> Preprocessing:
        """How a new scan is brought to the form of the cases."""
        ...

    @property
    def label_values(self) -> tuple[int, ...] | None:
        """What files of labels hold for each class, where that is not its number."""
        ...

    @property
    def has_validation(self) -> bool:
        """Whether evaluation_cases accepts "validation"."""
        ...

    def training_cases(self, labelled: int) -> tuple[list[Case], Sequence[Case | UnlabelledCase]]:
        """Return the labelled and the unlabelled training cases, all in memory.

        `labelled` counts volumes, or patients where the cases are slices. Before a case is read, raises ValueError if a
        patient is in two lists, FileNotFoundError if an evaluation list or a file that it names is missing.
        """
        ...

    def patient(self, name: str) -> str:
        """Whose case this is, of training or of evaluation, as far as its name tells."""
        ...

    def evaluation_names(self, split: str) -> list[str]:
        """Names of the cases of "validation" or "test", in their order."""
        ...

    def evaluation_cases(self, split: str, only: Collection[str] | None = None) -> Iterator[Case]:
        """Yield the volumes of "validation" or "test", or only those of some names, one in memory at a time.

        Missing or malformed files are found when this is called, not when their turn comes. Files of other names
        are left alone.
        """
        ...


ON_DISK: dict[str, tuple[Callable[[Path], Dataset], str]] = {
    "la": (LeftAtrium, "LA"),
    "acdc": (ACDC, "ACDC"),
    "pancreas": (Pancreas, "Pancreas"),
    "own": (OwnData, "own"),
}


def open_dataset(
    name: str,  # "la", "acdc", "pancreas", "own" or "phantom"
    root: str | os.PathLike[str] | None = None,  # folder of the dataset; None: the environment says where
    cohort_seed: int = 0,  # which phantom cohort; datasets on disk have only one
) -> Dataset:
    """Open a dataset by name.

    Raises ValueError for an unknown name or when neither `root` nor SEMISEG_DATA says where the files are,
    FileNotFoundError when that folder does not exist.
    """
    if name == "phantom":
        if root is not None:
            raise ValueError(f"dataset.root is {str(root)!r}, accepted for the phantom, which is generated, is none")
        return Phantom(cohort_seed)
    if name not in ON_DISK:
        raise ValueError(f"dataset.name is {name!r}, accepted are {', '.join(ON_DISK)}, phantom")
    dataset, folder = ON_DISK[name]
    return dataset(_find_root(root, folder))


def _find_root(root: str | os.PathLike[str] | None, folder: str) -> Path:
    if root is not None:
        path = Path(os.path.expanduser(root))
    elif os.environ.get(ENVIRONMENT):
        path = Path(os.environ[ENVIRONMENT]) / folder
    else:
        raise ValueError(
            f"no folder for {folder}: set the configuration's dataset.root to it, "
            f"or the environment variable {ENVIRONMENT} to the folder that holds {folder}"
        )
    if not path.is_dir():
        raise FileNotFoundError(
            f"{path}: no such folder; dataset.root, or {ENVIRONMENT}/{folder}, must be the folder of {folder}"
        )
    return path
