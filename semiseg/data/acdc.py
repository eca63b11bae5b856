"""ACDC (Automated Cardiac Diagnosis Challenge) in the h5 form that semi-supervised work uses."""

from collections.abc import Collection, Iterator
from functools import partial
from pathlib import Path

from semiseg.data.case import Case
from semiseg.data.files import check_evaluation_lists, check_labelled, read_case, read_cases_lazily, read_list
from semiseg.data.preprocessing import Preprocessing
from semiseg.data.volumes import TEST_LIST, VALIDATION_LIST

TRAINING_SLICES_LIST = "train_slices.list"
EVALUATION_LISTS = {"validation": VALIDATION_LIST, "test": TEST_LIST}


class ACDC:
    """Cine MRI of 70 training, 10 validation and 20 test patients, trained on slices, evaluated on volumes.

    `root` holds `data/slices/<name>.h5` ([H, W]) for training, `data/<name>.h5` ([slices, H, W]) for
    evaluation, both min-max normalised per volume, and `train_slices.list`, `val.list`, `test.list`. No file
    carries its spacing.
    """

    class_names = ("background", "right ventricle", "myocardium", "left ventricle")
    dimensions = 2
    has_validation = True
    # Slices [y, x], first axis from slice to slice; a stack that is not axial has Volume.slice_orientation instead.
    preprocessing = Preprocessing(orientation="SPL", spacing=None, intensity="unit_range")
    label_values = None

    def __init__(self, root: Path) -> None:
        self.root = root

    def patient(self, name: str) -> str:
        """patient099_frame01_slice_15 -> patient099"""
        return name.split("_frame")[0]

    def training_cases(self, labelled: int) -> tuple[list[Case], list[Case]]:
        """Read all training slices; those of the first `labelled` patients of the list are labelled.

        With the field's list 3 patients are 68 slices and 7 patients 136.
        """
        source = self.root / TRAINING_SLICES_LIST
        names = read_list(source)
        lists = (self.root / name for name in EVALUATION_LISTS.values())
        check_evaluation_lists(lists, partial(volume_path, self.root), names, self.patient)
        patients = list(dict.fromkeys(map(self.patient, names)))
        check_labelled(labelled, len(patients), "patients", source)
        cases = [read_case(slice_path(self.root, name), name, 2, len(self.class_names)) for name in names]
        labelled_patients = set(patients[:labelled])
        return (
            [case for case in cases if self.patient(case.name) in labelled_patients],
            [case for case in cases if self.patient(case.name) not in labelled_patients],
        )

    def evaluation_names(self, split: str) -> list[str]:
        """The names of val.list or test.list."""
        if split not in EVALUATION_LISTS:
            raise ValueError(f"split is {split!r}; ACDC has 'validation' and 'test'")
        return read_list(self.root / EVALUATION_LISTS[split])

    def evaluation_cases(self, split: str, only: Collection[str] | None = None) -> Iterator[Case]:
        """Yield the volumes [slices, H, W] of val.list or test.list, or only those of some names, one at a time."""
        names = [name for name in self.evaluation_names(split) if only is None or name in only]
        paths = [volume_path(self.root, name) for name in names]
        return read_cases_lazily(paths, names, 3, len(self.class_names))


def slice_path(root: Path, name: str) -> Path:
    """Where a training slice lies."""
    return root / "data" / "slices" / f"{name}.h5"


def volume_path(root: Path, name: str) -> Path:
    """Where a volume for evaluation lies."""
    return root / "data" / f"{name}.h5"
