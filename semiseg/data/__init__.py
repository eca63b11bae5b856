"""Datasets, augmentation, sampling and copy-paste."""

from semiseg.data.augmentation import Augmentation, resize
from semiseg.data.case import Case, UnlabelledCase
from semiseg.data.copy_paste import copy_paste, region_map, zero_box_mask
from semiseg.data.dataset import Dataset, open_dataset
from semiseg.data.sampling import TrainingSampler
from semiseg.data.training_tensors import TrainingTensors

__all__ = [
    "Augmentation",
    "Case",
    "Dataset",
    "TrainingSampler",
    "TrainingTensors",
    "UnlabelledCase",
    "copy_paste",
    "open_dataset",
    "region_map",
    "resize",
    "zero_box_mask",
]
