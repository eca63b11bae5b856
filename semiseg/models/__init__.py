"""Networks, and thin modules around the operations of semiseg_kernels."""

from typing import Any

from torch import nn

from semiseg.models.dynamic_labelling import branch_weights, dynamic_pseudo_label, pseudo_label_loss
from semiseg.models.losses import (
    cross_pseudo_supervision,
    mutual_consistency,
    region_weighted_loss,
    regions_by_image,
    sigmoid_ramp_up,
)
from semiseg.models.predicted_class import predicted_class
from semiseg.models.prototype_classifier import PrototypeClassifier
from semiseg.models.two_branches import Branches, TwoDecoders, TwoDecoderUNet, TwoDecoderVNet, TwoNetworks
from semiseg.models.unet import UNet
from semiseg.models.vision_text import VisionTextConsistency, agreement_map
from semiseg.models.vnet import VNet
from semiseg.models.voxel_prompt import VoxelPrompt

__all__ = [
    "TWO_DECODERS",
    "Branches",
    "PrototypeClassifier",
    "TwoDecoderUNet",
    "TwoDecoderVNet",
    "TwoDecoders",
    "TwoNetworks",
    "UNet",
    "VNet",
    "VisionTextConsistency",
    "VoxelPrompt",
    "agreement_map",
    "branch_weights",
    "build_network",
    "cross_pseudo_supervision",
    "dynamic_pseudo_label",
    "embedding_width",
    "mutual_consistency",
    "predicted_class",
    "pseudo_label_loss",
    "region_weighted_loss",
    "regions_by_image",
    "sigmoid_ramp_up",
]

NETWORKS: dict[str, type[nn.Module]] = {"vnet": VNet, "unet": UNet}
TWO_DECODERS: dict[str, type[TwoDecoders]] = {"vnet": TwoDecoderVNet, "unet": TwoDecoderUNet}


def build_network(
    name: str,  # "vnet" (volumes) or "unet" (slices)
    **options: Any,  # of the constructor: in_channels, num_classes, filters, dropout, ...
) -> nn.Module:
    """The network of that name, weights drawn from torch's global generator. ValueError for another name."""
    if name not in NETWORKS:
        raise ValueError(f"name is {name!r}, accepted are {', '.join(map(repr, NETWORKS))}")
    return NETWORKS[name](**options)


def embedding_width(network: nn.Module) -> int:
    """Channels d of the embedding a network returns beside its logits."""
    classifier = network.classifier
    assert isinstance(classifier, nn.Conv2d | nn.Conv3d)
    return classifier.in_channels
