"""A dataset of one's own, as `python -m semiseg.prepare own` writes it."""

import math
import re
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
CHANNEL_BYTES, LABEL_BYTES = 4, 1  # a voxel: float32 and uint8
SLICE = "#"  # between the name of a volume and the number of its slice


class OwnData(Volumes):
    """Volumes of which some were never labelled; classes, channels, spacing and preprocessing are in their description.

    `root` holds `cases/<name>.h5`, of which the unlabelled ones have no `label`, `train.list`, `test.list`,
    perhaps `val.list`, and `dataset.json`. Of two dimensions, volumes are stacks [M, slices, H, W] that have spacings of
    their own, and are trained on slice by slice. Raises FileNotFoundError where the description is missing, ValueError
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
        self.dimensions = description.dimensions
        self.spacing = None
        if self.dimensions == 3:
            self.spacing = tuple(size for size in self.preprocessing.spacing or () if size is not None)
            if len(self.spacing) < 3:
                raise ValueError(f"{root / DESCRIPTION}: names no spacing; expected one in mm for all cases")
        self.has_validation = (root / VALIDATION_LIST).is_file()
        validation = {"validation": VALIDATION_LIST} if self.has_validation else {}
        self.evaluation_lists = {**validation, "test": TEST_LIST}

    def path(self, name: str) -> Path:
        return self.root / "cases" / f"{name}.h5"

    def patient(self, name: str) -> str:
        """Of a slice the volume."""
        return re.sub(rf"{SLICE}\d+$", "", name) if self.dimensions == 2 else name

    def training_cases(self, labelled: int) -> tuple[list[Case], Sequence[Case | UnlabelledCase]]:
        """Read all training volumes; the first `labelled` of train.list that have a label are labelled.

        Of two dimensions they are returned slice by slice. Images of the others stay in their files where all together
        would take more than their share of the memory. Raises ValueError where already the labelled ones do.
        """
        names = self.training_names()
        with_label = [name for name in names if has_label(self.path(name))]
        check_labelled(labelled, len(with_label), "labelled volumes", self.root / TRAINING_LIST)
        chosen, channels = with_label[:labelled], self.channels
        images = {name: DiskImage.open(self.path(name), 3, channels) for name in names if name not in chosen}
        voxels = sum(math.prod(image_shape(self.path(name), 3, channels)[1:]) for name in chosen)
        size = (CHANNEL_BYTES * channels + LABEL_BYTES) * voxels
        there = MEMORY_SHARE * available_memory()
        if size > there:
            raise ValueError(
                f"dataset.labelled is {labelled}, cases of {size / 2**30:.3g} GB, accepted are as many as take up to "
                f"{there / 2**30:.3g} GB, {MEMORY_SHARE:.0%} of the memory that is available"
            )
        on_disk = size + sum(image.nbytes for image in images.values()) > there
        with_labels = [self.read(name) for name in chosen]
        others = [
            UnlabelledCase(name, image) if on_disk else read_unlabelled_case(image.path, name, 3, channels)
            for name, image in images.items()
        ]
        if self.dimensions == 2:
            with_labels = [piece for case in with_labels for piece in _slices(case)]
            others = [piece for case in others for piece in _unlabelled_slices(case)]
        return with_labels, others


def _slices(case: Case) -> list[Case]:
    return [
        Case(f"{case.name}{SLICE}{number}", image, label, None)
        for number, (image, label) in enumerate(zip(case.image.swapaxes(0, 1), case.label, strict=True), start=1)
    ]


def _unlabelled_slices(case: UnlabelledCase) -> list[UnlabelledCase]:
    planes = case.image.planes() if isinstance(case.image, DiskImage) else case.image.swapaxes(0, 1)
    return [UnlabelledCase(f"{case.name}{SLICE}{number}", plane) for number, plane in enumerate(planes, start=1)]
