"""Pancreas-CT (National Institutes of Health) in the h5 form that semi-supervised work uses."""

from pathlib import Path

from semiseg.data.description import DatasetDescription
from semiseg.data.own import DESCRIPTION
from semiseg.data.preprocessing import Intensity, Preprocessing
from semiseg.data.volumes import Volumes


class Pancreas(Volumes):
    """62 training and 20 test CT volumes at 1 mm, cropped around the pancreas, zero mean and unit variance.

    `root` holds `Pancreas_h5/<id>_norm.h5`, `train.list`, `test.list` and, from `python -m semiseg.prepare pancreas`,
    `dataset.json`: how to bring a whole scan to the intensities of the crops. ValueError where that cannot be read.
    """

    class_names = ("background", "pancreas")
    spacing = (1.0, 1.0, 1.0)  # mm, what the volumes are resampled to
    preprocessing = Preprocessing(orientation="LPS", spacing=spacing, channels=(Intensity(clip=(-125.0, 275.0)),))  # Hounsfield units

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        if (root / DESCRIPTION).is_file():
            self.preprocessing = DatasetDescription.load(root / DESCRIPTION).preprocessing

    def path(self, name: str) -> Path:
        return self.root / "Pancreas_h5" / f"{name}_norm.h5"
