"""Datasets, augmentation, sampling and copy-paste."""

from semiseg.data.augmentation import Augmentation, random_crop, random_rotate, random_rotate_flip, resize
from semiseg.data.case import Case, UnlabelledCase
from semiseg.data.connected_components import largest_components
from semiseg.data.copy_paste import copy_paste, region_map, zero_box_mask
from semiseg.data.dataset import Dataset, open_dataset
from semiseg.data.sampling import TrainingSampler

__all__ = [
    "Augmentation",
    "Case",
    "Dataset",
    "TrainingSampler",
    "UnlabelledCase",
    "copy_paste",
    "largest_components",
    "open_dataset",
    "random_crop",
    "random_rotate",
    "random_rotate_flip",
    "region_map",
    "resize",
    "zero_box_mask",
]
