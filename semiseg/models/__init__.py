"""Networks, and thin modules around the operations of semiseg_kernels."""

from typing import Any

from torch import nn

from semiseg.models.losses import region_weighted_loss, sigmoid_ramp_up
from semiseg.models.prototype_classifier import PrototypeClassifier
from semiseg.models.unet import UNet
from semiseg.models.vnet import VNet

__all__ = ["PrototypeClassifier", "UNet", "VNet", "build_network", "region_weighted_loss", "sigmoid_ramp_up"]

NETWORKS: dict[str, type[nn.Module]] = {"vnet": VNet, "unet": UNet}


def build_network(
    name: str,  # "vnet" (volumes) or "unet" (slices)
    **options: Any,  # of the constructor: in_channels, num_classes, filters, dropout, ...
) -> nn.Module:
    """The network of that name, weights drawn from torch's global generator. ValueError for another name."""
    if name not in NETWORKS:
        raise ValueError(f"name is {name!r}, accepted are {', '.join(map(repr, NETWORKS))}")
    return NETWORKS[name](**options)
