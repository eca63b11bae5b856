"""Left atrium (2018 Atrial Segmentation Challenge) in the h5 form that semi-supervised work uses."""

from pathlib import Path

from semiseg.data.preprocessing import Preprocessing
from semiseg.data.volumes import Volumes


class LeftAtrium(Volumes):
    """80 training and 20 test MRI volumes of the left atrium, cropped around it, zero mean and unit variance.

    `root` holds `2018LA_Seg_Training Set/<id>/mri_norm2.h5`, `train.list` and `test.list`.
    """

    class_names = ("background", "left atrium")
    spacing = (0.625, 0.625, 0.625)  # mm, the challenge's
    preprocessing = Preprocessing(orientation="LPS", spacing=spacing)

    def path(self, name: str) -> Path:
        return self.root / "2018LA_Seg_Training Set" / name / "mri_norm2.h5"
