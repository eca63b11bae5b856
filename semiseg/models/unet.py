"""U-Net for slices, in the form semi-supervised methods on ACDC compare with."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from semiseg.models.batch_norm import NEGATIVE_SLOPE, BatchNormReLU
from semiseg.models.convolution import Convolution2d, TransposedConvolution2d
from semiseg.models.dropout import Dropout
from semiseg.models.linear_classifier import LinearClassifier2d
from semiseg.models.upsampling import LinearUpsampling
from semiseg.models.vnet import check_upsampling


def _stage(in_channels: int, channels: int, dropout: float) -> nn.Sequential:
    # A bias ahead of batch normalisation has no effect.
    return nn.Sequential(
        Convolution2d(in_channels, channels, bias=False),
        BatchNormReLU(channels, NEGATIVE_SLOPE),
        Dropout(dropout),
        Convolution2d(channels, channels, bias=False),
        BatchNormReLU(channels, NEGATIVE_SLOPE),
    )


class UNetEncoder(nn.Module):
    """The contracting half: features at as many resolutions as filters, each half the side of the last."""

    def __init__(
        self,
        in_channels: int = 1,
        filters: Sequence[int] = (16, 32, 64, 128, 256),  # per stage
        dropout: Sequence[float] = (0.05, 0.1, 0.2, 0.3, 0.5),  # of single values, per stage
    ) -> None:
        super().__init__()
        if len(dropout) != len(filters):
            raise ValueError(
                f"dropout has {len(dropout)} values, accepted are as many as filters, {len(filters)}"
            )
        self.stages = nn.ModuleList(
            _stage(before, width, probability)
            for before, width, probability in zip((in_channels, *filters[:-1]), filters, dropout, strict=True)
        )
        self.down = nn.MaxPool2d(2)
        self.side_multiple = 2 ** (len(filters) - 1)

    def forward(
        self,
        x: Tensor,  # [B, in_channels, H, W]
    ) -> list[Tensor]:
        """Features [B, filters[i], H / 2**i, W / 2**i]."""
        if any(side % self.side_multiple for side in x.shape[2:]):
            raise ValueError(
                f"x has sides {tuple(x.shape[2:])}, accepted are multiples of {self.side_multiple}"
            )
        features = [self.stages[0](x)]
        for stage in self.stages[1:]:
            features.append(stage(self.down(features[-1])))
        return features


class UNetDecoder(nn.Module):
    """The expanding half: upsampling and skip connections that are concatenated."""

    def __init__(
        self,
        filters: Sequence[int] = (16, 32, 64, 128, 256),
        upsampling: str = "transposed",  # convolutions; linear: bilinear, then a 3x3 convolution
    ) -> None:
        super().__init__()
        check_upsampling(upsampling)
        self.up = nn.ModuleList(
            TransposedConvolution2d(below, width)
            if upsampling == "transposed"
            else nn.Sequential(LinearUpsampling(), Convolution2d(below, width))
            for below, width in zip(filters[:0:-1], filters[-2::-1], strict=True)
        )
        self.stages = nn.ModuleList(_stage(2 * width, width, dropout=0.0) for width in filters[-2::-1])

    def forward(
        self,
        features: list[Tensor],  # of the encoder, finest first; taken from the list as they are used, to be freed
    ) -> Tensor:
        """Embedding [B, filters[0], H, W]."""
        x = features.pop()
        for up, stage in zip(self.up, self.stages, strict=True):
            x = torch.cat((features.pop(), up(x)), dim=1)
            x = stage(x)
        return x


class UNet(nn.Module):
    """U-Net: two convolutions a stage, batch normalisation, dropout in the encoder, concatenated skips.

    `network(x)` returns the logits and the embedding z of every pixel, which is the input of the linear
    classifier (MPER eq. 3). Random weights are PyTorch's, from its global generator.
    Source: O. Ronneberger et al., U-Net, MICCAI 2015, with the widths and dropout of SSL4MIS.
    """

    def __init__(
        self,
        in_channels: int = 1,
        num_classes: int = 4,
        filters: Sequence[int] = (16, 32, 64, 128, 256),  # per stage; the first is the width of the embedding
        dropout: Sequence[float] = (0.05, 0.1, 0.2, 0.3, 0.5),  # of single values, per stage of the encoder
    ) -> None:
        super().__init__()
        self.encoder = UNetEncoder(in_channels, filters, dropout)
        self.decoder = UNetDecoder(filters)
        self.classifier = LinearClassifier2d(filters[0], num_classes)

    def forward(
        self,
        x: Tensor,  # [B, in_channels, H, W], sides multiples of 16 (2 per halving)
    ) -> tuple[Tensor, Tensor]:
        """Logits [B, num_classes, H, W] and embedding [B, filters[0], H, W]. ValueError for other sides."""
        embedding = self.decoder(self.encoder(x))
        return self.classifier(embedding), embedding
