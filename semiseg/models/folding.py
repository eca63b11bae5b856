"""Batch normalisation folded into the convolutions before it, for evaluation."""

import copy
from itertools import pairwise
from typing import TypeVar

from torch import nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.utils.fusion import fuse_conv_bn_eval

from semiseg.models.batch_norm import BatchNormReLU
from semiseg.models.convolution import ActivatedConvolution, Convolution2d, Convolution3d
from semiseg_kernels import fix_weight

Module = TypeVar("Module", bound=nn.Module)


def fold_batch_norm(
    module: Module,  # a network, or what holds some
) -> Module:
    """A copy in eval mode where convolutions do what batch normalisation and ReLU behind them did.

    Found are those that follow each other in an `nn.Sequential`, transposed convolutions among them. The copy
    computes the same but for rounding, and has weights of its own, which stay as they are: the original can be
    trained on.
    """
    folded = copy.deepcopy(module).eval().requires_grad_(False)
    for sequence in list(folded.modules()):
        if not isinstance(sequence, nn.Sequential):
            continue
        # From the end, as what goes moves the layers behind it.
        for index, (convolution, layer) in reversed(list(enumerate(pairwise(list(sequence))))):
            if isinstance(convolution, _ConvNd) and isinstance(layer, BatchNormReLU):
                transposed = isinstance(convolution, _ConvTransposeNd)
                sequence[index] = fused = fuse_conv_bn_eval(convolution, layer, transposed)
                if isinstance(fused, ActivatedConvolution):
                    fused.negative_slope = layer.negative_slope
                    del sequence[index + 1]
                else:
                    sequence[index + 1] = _relu(layer.negative_slope)
    for layer in folded.modules():
        if isinstance(layer, Convolution2d | Convolution3d):
            fix_weight(layer.weight)
    return folded


def _relu(negative_slope: float) -> nn.Module:
    return nn.LeakyReLU(negative_slope, inplace=True) if negative_slope else nn.ReLU(inplace=True)
