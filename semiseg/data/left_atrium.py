"""Left atrium (2018 Atrial Segmentation Challenge) in the h5 form that semi-supervised work uses."""

from collections.abc import Iterator
from pathlib import Path

from semiseg.data.case import Case
from semiseg.data.files import check_labelled, read_case, read_cases_lazily, read_list

VOLUMES = "2018LA_Seg_Training Set"


class LeftAtrium:
    """80 training and 20 test MRI volumes of the left atrium, cropped around it, zero mean and unit variance.

    `root` holds `2018LA_Seg_Training Set/<id>/mri_norm2.h5`, `train.list` and `test.list`.
    """

    class_names = ("background", "left atrium")
    dimensions = 3
    has_validation = False
    spacing = (0.625, 0.625, 0.625)  # mm, the challenge's; the files do not carry it

    def __init__(self, root: Path) -> None:
        self.root = root

    def training_cases(self, labelled: int) -> tuple[list[Case], list[Case]]:
        """Read all training volumes; the first `labelled` of train.list are labelled."""
        source = self.root / "train.list"
        names = read_list(source)
        check_labelled(labelled, len(names), "volumes", source)
        cases = [read_case(self._path(name), name, 3, len(self.class_names), self.spacing) for name in names]
        return cases[:labelled], cases[labelled:]

    def evaluation_cases(self, split: str) -> Iterator[Case]:
        """Yield the volumes of test.list one at a time; `split` must be "test"."""
        if split != "test":
            raise ValueError(f"split is {split!r}; the left atrium has 'test' only")
        names = read_list(self.root / "test.list")
        return read_cases_lazily(
            [self._path(name) for name in names], names, 3, len(self.class_names), self.spacing
        )

    def _path(self, name: str) -> Path:
        return self.root / VOLUMES / name / "mri_norm2.h5"
