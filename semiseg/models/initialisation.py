"""Weights at the start of training other than PyTorch's."""

from torch import nn


def initialise(
    network: nn.Module,
    initialisation: str,  # he; pytorch leaves what PyTorch's layers have drawn
) -> None:
    """Draw convolution weights from He's normal distribution, in place; biases 0.

    The batch normalisations keep PyTorch's start (scale 1, shift 0). Uses torch's global random generator.
    Source: K. He et al., Delving deep into rectifiers, ICCV 2015.
    """
    if initialisation == "pytorch":
        return
    for layer in network.modules():
        if isinstance(layer, (nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d, nn.ConvTranspose3d)):
            nn.init.kaiming_normal_(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
