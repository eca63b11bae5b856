"""Fused operations on voxel embeddings and prototypes, for 2D and 3D segmentation."""

from .backends import available_backends, use_backend
from .cluster_mean import cluster_mean
from .dice_ce import DiceCE, dice_ce
from .masked_class_mean import masked_class_mean
from .momentum_update import momentum_update_
from .process_group import sum_over_processes, use_process_group
from .prompt_conv import prompt_conv
from .prompt_mix import prompt_mix
from .prototype_head import PrototypeHead, prototype_head
from .prototype_info_nce import prototype_info_nce
from .prototype_similarity import prototype_similarity

__all__ = [
    "DiceCE",
    "PrototypeHead",
    "available_backends",
    "cluster_mean",
    "dice_ce",
    "masked_class_mean",
    "momentum_update_",
    "prompt_conv",
    "prompt_mix",
    "prototype_head",
    "prototype_info_nce",
    "prototype_similarity",
    "sum_over_processes",
    "use_backend",
    "use_process_group",
]
