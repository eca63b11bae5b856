"""ACDC (Automated Cardiac Diagnosis Challenge) in the h5 form that semi-supervised work uses."""

from collections.abc import Mapping
from pathlib import Path

from semiseg.data.case import Case
from semiseg.data.files import check_labelled, read_case
from semiseg.data.preprocessing import Intensity, Preprocessing
from semiseg.data.volumes import TEST_LIST, VALIDATION_LIST, Volumes

TRAINING_SLICES_LIST = "train_slices.list"


class ACDC(Volumes):
    """Cine MRI of 70 training, 10 validation and 20 test patients, trained on slices, evaluated on volumes.

    `root` holds `data/slices/<name>.h5` ([H, W]) for training, `data/<name>.h5` ([slices, H, W]) for
    evaluation, both min-max normalised per volume, and `train_slices.list`, `val.list`, `test.list`. No file
    carries its spacing.
    """

    class_names = ("background", "right ventricle", "myocardium", "left ventricle")
    spacing = None
    # Slices [y, x], first axis from slice to slice; a stack that is not axial has Volume.slice_orientation instead.
    preprocessing = Preprocessing(orientation="SPL", spacing=None, channels=(Intensity("unit_range"),))
    dimensions = 2
    has_validation = True
    training_list = TRAINING_SLICES_LIST
    evaluation_lists: Mapping[str, str] = {"validation": VALIDATION_LIST, "test": TEST_LIST}

    def path(self, name: str) -> Path:
        return self.root / "data" / f"{name}.h5"

    def patient(self, name: str) -> str:
        """patient099_frame01_slice_15 -> patient099"""
        return name.split("_frame")[0]

    def training_cases(self, labelled: int) -> tuple[list[Case], list[Case]]:
        """Read all training slices; those of the first `labelled` patients of the list are labelled.

        With the field's list 3 patients are 68 slices and 7 patients 136.
        """
        names = self.training_names()
        patients = list(dict.fromkeys(map(self.patient, names)))
        check_labelled(labelled, len(patients), "patients", self.root / TRAINING_SLICES_LIST)
        cases = [read_case(slice_path(self.root, name), name, 2, len(self.class_names)) for name in names]
        labelled_patients = set(patients[:labelled])
        return (
            [case for case in cases if self.patient(case.name) in labelled_patients],
            [case for case in cases if self.patient(case.name) not in labelled_patients],
        )


def slice_path(root: Path, name: str) -> Path:
    """Where a training slice lies."""
    return root / "data" / "slices" / f"{name}.h5"
