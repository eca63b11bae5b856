"""A dataset of one's own, as `python -m semiseg.prepare own` writes it."""

import math
from collections.abc import Sequence
from pathlib import Path

from semiseg.data.case import Case, UnlabelledCase
from semiseg.data.description import DatasetDescription
from semiseg.data.disk_image import DiskImage
from semiseg.data.files import check_labelled, has_label, image_shape, read_unlabelled_case
from semiseg.data.volumes import TEST_LIST, TRAINING_LIST, VALIDATION_LIST, Volumes
from semiseg.memory import available_memory

DESCRIPTION = "dataset.json"
MEMORY_SHARE = 0.5  # of what is available; training needs the rest
LABELLED_BYTES = 5  # a voxel: a float32 image and a uint8 label


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
        """Read all training volumes; the first `labelled` of train.list that have a label are labelled.

        Images of the others stay in their files where all together would take more than their share of the memory.
        Raises ValueError where already the labelled ones do.
        """
        names = self.training_names()
        with_label = [name for name in names if has_label(self.path(name))]
        check_labelled(labelled, len(with_label), "labelled volumes", self.root / TRAINING_LIST)
        chosen = with_label[:labelled]
        images = {name: DiskImage.open(self.path(name), 3) for name in names if name not in chosen}
        size = sum(LABELLED_BYTES * math.prod(image_shape(self.path(name), 3)) for name in chosen)
        there = MEMORY_SHARE * available_memory()
        if size > there:
            raise ValueError(
                f"dataset.labelled is {labelled}, cases of {size / 2**30:.3g} GB, accepted are as many as take up to "
                f"{there / 2**30:.3g} GB, {MEMORY_SHARE:.0%} of the memory that is available"
            )
        on_disk = size + sum(image.nbytes for image in images.values()) > there
        return (
            [self.read(name) for name in chosen],
            [
                UnlabelledCase(name, image) if on_disk else read_unlabelled_case(image.path, name, 3)
                for name, image in images.items()
            ],
        )
