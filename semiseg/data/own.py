"""A dataset of one's own, as `python -m semiseg.prepare own` writes it."""

from collections.abc import Sequence
from pathlib import Path

from semiseg.data.case import Case, UnlabelledCase
from semiseg.data.description import DatasetDescription
from semiseg.data.files import check_labelled, has_label, read_unlabelled_case
from semiseg.data.volumes import TEST_LIST, TRAINING_LIST, VALIDATION_LIST, Volumes

DESCRIPTION = "dataset.json"


class OwnData(Volumes):
    """Volumes of which some were never labelled; classes, spacing and preprocessing are in their description.

    `root` holds `cases/<name>.h5`, of which the unlabelled ones have no `label`, `train.list`, `test.list`,
    perhaps `val.list`, and `dataset.json`. Raises FileNotFoundError where the description is missing, ValueError
    where it cannot be read.
    """

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        if not (root / DESCRIPTION).is_file():
            raise FileNotFoundError(
                f"{root}: holds no {DESCRIPTION}; expected a folder that `python -m semiseg.prepare own` wrote"
            )
        description = DatasetDescription.load(root / DESCRIPTION)
        self.class_names = description.class_names
        self.preprocessing = description.preprocessing
        self.label_values = description.label_values
        if self.preprocessing.spacing is None:
            raise ValueError(f"{root / DESCRIPTION}: names no spacing; expected one in mm for all cases")
        self.spacing = self.preprocessing.spacing
        self.has_validation = (root / VALIDATION_LIST).is_file()
        validation = {"validation": VALIDATION_LIST} if self.has_validation else {}
        self.evaluation_lists = {**validation, "test": TEST_LIST}

    def path(self, name: str) -> Path:
        return self.root / "cases" / f"{name}.h5"

    def training_cases(self, labelled: int) -> tuple[list[Case], Sequence[Case | UnlabelledCase]]:
        """Read all training volumes; the first `labelled` of train.list that have a label are labelled."""
        names = self.training_names()
        with_label = [name for name in names if has_label(self.path(name))]
        check_labelled(labelled, len(with_label), "labelled volumes", self.root / TRAINING_LIST)
        chosen = with_label[:labelled]
        others = [name for name in names if name not in chosen]
        return (
            [self.read(name) for name in chosen],
            [read_unlabelled_case(self.path(name), name, 3) for name in others],
        )
