"""Pancreas-CT (National Institutes of Health) in the h5 form that semi-supervised work uses."""

from pathlib import Path

from semiseg.data.preprocessing import Preprocessing
from semiseg.data.volumes import Volumes


class Pancreas(Volumes):
    """62 training and 20 test CT volumes at 1 mm, cropped around the pancreas, zero mean and unit variance.

    `root` holds `Pancreas_h5/<id>_norm.h5`, `train.list` and `test.list`.
    """

    class_names = ("background", "pancreas")
    spacing = (1.0, 1.0, 1.0)  # mm, what the volumes are resampled to
    preprocessing = Preprocessing(orientation="LPS", spacing=spacing, clip=(-125.0, 275.0))  # Hounsfield units

    def path(self, name: str) -> Path:
        return self.root / "Pancreas_h5" / f"{name}_norm.h5"
