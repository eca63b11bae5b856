"""Networks, and thin modules around the operations of semiseg_kernels."""

from typing import Any

from torch import nn

from semiseg.models.losses import region_weighted_loss, sigmoid_ramp_up
from semiseg.models.prototype_classifier import PrototypeClassifier
from semiseg.models.unet import UNet
from semiseg.models.vnet import VNet

__all__ = [
    "PrototypeClassifier",
    "UNet",
    "VNet",
    "build_network",
    "embedding_width",
    "region_weighted_loss",
    "sigmoid_ramp_up",
]

NETWORKS: dict[str, type[nn.Module]] = {"vnet": VNet, "unet": UNet}


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
