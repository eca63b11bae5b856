"""Fused operations on voxel embeddings and prototypes, for 2D and 3D segmentation."""

from .backends import available_backends, use_backend
from .batch_norm_relu import batch_norm_relu
from .cluster_mean import cluster_mean
from .convolution import convolution
from .dice_ce import DiceCE, dice_ce
from .fixed_weights import fix_weight
from .largest_components import largest_components
from .linear_classifier import linear_classifier
from .linear_upsampling import linear_upsampling
from .masked_class_mean import masked_class_mean
from .momentum_update import momentum_update_
from .process_group import sum_over_processes, use_process_group
from .prompt_conv import prompt_conv
from .prompt_mix import prompt_mix
from .prototype_head import PrototypeHead, prototype_head
from .prototype_info_nce import prototype_info_nce
from .prototype_similarity import prototype_similarity
from .recomputation import recomputable, recomputed_results
from .strided_convolution import strided_convolution, transposed_convolution

__all__ = [
    "DiceCE",
    "PrototypeHead",
    "available_backends",
    "batch_norm_relu",
    "cluster_mean",
    "convolution",
    "dice_ce",
    "fix_weight",
    "largest_components",
    "linear_classifier",
    "linear_upsampling",
    "masked_class_mean",
    "momentum_update_",
    "prompt_conv",
    "prompt_mix",
    "prototype_head",
    "prototype_info_nce",
    "prototype_similarity",
    "recomputable",
    "recomputed_results",
    "strided_convolution",
    "sum_over_processes",
    "transposed_convolution",
    "use_backend",
    "use_process_group",
]
