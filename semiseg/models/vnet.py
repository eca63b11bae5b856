"""V-Net for volumes, in the form semi-supervised methods on the left atrium compare with."""

from typing import cast

import torch
from torch import Tensor, nn

from semiseg.models.batch_norm import BatchNormReLU
from semiseg.models.convolution import Convolution3d, StridedConvolution3d, TransposedConvolution3d
from semiseg.models.dropout import ChannelDropout
from semiseg.models.linear_classifier import LinearClassifier3d
from semiseg.models.upsampling import LinearUpsampling
from semiseg_kernels import recomputable

UPSAMPLING = ("transposed", "linear")  # convolutions; interpolation and then a convolution
CONVOLUTIONS_PER_STAGE = (1, 2, 3, 3, 3)  # of side 3, from full resolution to the bottleneck
SIDE_MULTIPLE = 2 ** (len(CONVOLUTIONS_PER_STAGE) - 1)


# The convolutions have no bias: ahead of batch normalisation it has no effect.


def _stage(convolutions: int, in_channels: int, channels: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for width in (in_channels, *[channels] * (convolutions - 1)):
        layers += [Convolution3d(width, channels, bias=False), BatchNormReLU(channels)]
    return nn.Sequential(*layers)


def _resample(
    convolution: type[StridedConvolution3d | TransposedConvolution3d],
    in_channels: int,
    channels: int,
) -> nn.Sequential:
    return nn.Sequential(convolution(in_channels, channels, bias=False), BatchNormReLU(channels))


def _interpolate(in_channels: int, channels: int) -> nn.Sequential:
    convolution = Convolution3d(in_channels, channels, bias=False)
    return nn.Sequential(LinearUpsampling(), convolution, BatchNormReLU(channels))


def check_upsampling(upsampling: str) -> None:
    """Raise ValueError for an upsampling that no decoder has."""
    if upsampling not in UPSAMPLING:
        raise ValueError(f"upsampling is {upsampling!r}, accepted are {', '.join(map(repr, UPSAMPLING))}")


def _upsample_and_add(up: nn.Module, x: Tensor, skip: Tensor) -> Tensor:
    if isinstance(up, nn.Sequential) and len(up) == 1:  # a folded convolution, which adds by itself
        return cast(Tensor, up[0](x, skip))
    return recomputable(torch.add, up(x), skip)


class VNetEncoder(nn.Module):
    """The contracting half: features at five resolutions, each half the side of the one before."""

    def __init__(
        self,
        in_channels: int = 1,
        filters: int = 16,
        dropout: float = 0.5,  # probability that a whole channel of the bottleneck is dropped
    ) -> None:
        super().__init__()
        widths = [filters * 2**stage for stage in range(len(CONVOLUTIONS_PER_STAGE))]
        self.stages = nn.ModuleList(
            _stage(convolutions, in_channels if stage == 0 else width, width)
            for stage, (convolutions, width) in enumerate(zip(CONVOLUTIONS_PER_STAGE, widths, strict=True))
        )
        self.down = nn.ModuleList(_resample(StridedConvolution3d, width, 2 * width) for width in widths[:-1])
        self.dropout = ChannelDropout(dropout)

    def forward(
        self,
        x: Tensor,  # [B, in_channels, *S]
    ) -> list[Tensor]:
        """Features [B, filters * 2**i, *(S / 2**i)] for i = 0..4."""
        if any(side % SIDE_MULTIPLE for side in x.shape[2:]):
            raise ValueError(f"x has sides {tuple(x.shape[2:])}, accepted are multiples of {SIDE_MULTIPLE}")
        features = [self.stages[0](x)]
        for down, stage in zip(self.down, self.stages[1:], strict=True):
            features.append(stage(down(features[-1])))
        features[-1] = self.dropout(features[-1])
        return features


class VNetDecoder(nn.Module):
    """The expanding half: upsampling and skip connections that are added."""

    def __init__(
        self,
        filters: int = 16,
        upsampling: str = "transposed",  # convolutions; linear: trilinear, then a 3x3x3 convolution
    ) -> None:
        super().__init__()
        check_upsampling(upsampling)
        widths = [filters * 2**stage for stage in reversed(range(len(CONVOLUTIONS_PER_STAGE) - 1))]
        self.up = nn.ModuleList(
            _resample(TransposedConvolution3d, 2 * width, width)
            if upsampling == "transposed"
            else _interpolate(2 * width, width)
            for width in widths
        )
        self.stages = nn.ModuleList(
            _stage(convolutions, width, width)
            for convolutions, width in zip(reversed(CONVOLUTIONS_PER_STAGE[:-1]), widths, strict=True)
        )

    def forward(
        self,
        features: list[Tensor],  # of the encoder, finest first; taken from the list as they are used, to be freed
    ) -> Tensor:
        """Embedding [B, filters, *S]."""
        x = features.pop()
        for up, stage in zip(self.up, self.stages, strict=True):
            x = _upsample_and_add(up, x, features.pop())
            x = stage(x)
        return x


class VNet(nn.Module):
    """V-Net: stages of 1, 2, 3, 3, 3 convolutions, batch normalisation, added skip connections, dropout.

    `network(x)` returns the logits and the embedding z of every voxel, which is the input of the linear
    classifier (MPER eq. 3). Random weights are PyTorch's, from its global generator.
    Source: F. Milletari et al., V-Net, 3DV 2016, as changed by L. Yu et al., UA-MT, MICCAI 2019.
    """

    def __init__(
        self,
        in_channels: int = 1,
        num_classes: int = 2,
        filters: int = 16,  # at full resolution, doubled at each halving; the width of the embedding
        dropout: float = 0.5,  # of whole channels, after the bottleneck and before the classifier
        embedding_after_dropout: bool = False,
    ) -> None:
        super().__init__()
        self.encoder = VNetEncoder(in_channels, filters, dropout)
        self.decoder = VNetDecoder(filters)
        self.dropout = ChannelDropout(dropout)
        self.classifier = LinearClassifier3d(filters, num_classes)
        self.embedding_after_dropout = embedding_after_dropout

    def forward(
        self,
        x: Tensor,  # [B, in_channels, *S], sides multiples of 16
    ) -> tuple[Tensor, Tensor]:
        """Logits [B, num_classes, *S] and embedding [B, filters, *S]. ValueError for other sides."""
        embedding = self.decoder(self.encoder(x))
        if self.embedding_after_dropout:
            embedding = self.dropout(embedding)
            return self.classifier(embedding), embedding
        return self.classifier(embedding, self.dropout.scale(embedding)), embedding
