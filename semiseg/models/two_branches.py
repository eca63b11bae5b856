"""Two segmentations of one image: two decoders on one encoder, or two networks."""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor, nn

from semiseg.models.dropout import ChannelDropout
from semiseg.models.linear_classifier import LinearClassifier2d, LinearClassifier3d
from semiseg.models.unet import UNetDecoder, UNetEncoder
from semiseg.models.vnet import VNetDecoder, VNetEncoder


class Branches(NamedTuple):
    """What two branches make of an image."""

    logits_a: Tensor  # [B, C, *S]
    logits_b: Tensor  # [B, C, *S]
    bottleneck: Tensor | None  # [B, F, *S / 16], what two decoders start from


class Decoding(nn.Module):
    """A decoder, dropout of whole channels and a linear classifier."""

    def __init__(
        self,
        decoder: nn.Module,
        dropout: float,  # probability
        classifier: nn.Module,
    ) -> None:
        super().__init__()
        self.decoder = decoder
        self.dropout = ChannelDropout(dropout)
        self.classifier = classifier

    def forward(
        self,
        features: list[Tensor],  # of the encoder, finest first; taken from the list as they are used
    ) -> tuple[Tensor, Tensor]:
        """Logits [B, C, *S] and embedding [B, d, *S]."""
        embedding = self.decoder(features)
        return self.classifier(embedding, self.dropout.scale(embedding)), embedding


class TwoDecoders(nn.Module):
    """One encoder and two decoders, for training; `network(x)` runs encoder, prompt and decoder A alone.

    `network(x)` returns the logits and the embedding of every voxel, as all networks do, and
    `network.branches(x)` what both decoders make of it. Random weights are PyTorch's, from its global generator.
    """

    def __init__(
        self, encoder: nn.Module, decoding_a: Decoding, decoding_b: Decoding, prompt: nn.Module | None
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.prompt = prompt or nn.Identity()
        self.decoding_a = decoding_a
        self.decoding_b = decoding_b

    def forward(
        self,
        x: Tensor,  # [B, in_channels, *S], sides multiples of 16
    ) -> tuple[Tensor, Tensor]:
        """Logits [B, num_classes, *S] and embedding [B, d, *S] of decoder A. ValueError for other sides."""
        return self.decoding_a(self.encode(x))

    def branches(
        self,
        x: Tensor,  # [B, in_channels, *S]
    ) -> Branches:
        """What both decoders make of the same features, and the bottleneck they share."""
        features = self.encode(x)
        bottleneck = features[-1]
        return Branches(self.decoding_a(list(features))[0], self.decoding_b(features)[0], bottleneck)

    def encode(
        self,
        x: Tensor,  # [B, in_channels, *S]
    ) -> list[Tensor]:
        """Features of the encoder, the coarsest with the prompt fused in."""
        features = self.encoder(x)
        features[-1] = self.prompt(features[-1])
        return features


class TwoDecoderVNet(TwoDecoders):
    """V-Net with a second decoder, which upsamples trilinearly and then convolves (MC-Net, MICCAI 2021)."""

    def __init__(
        self,
        in_channels: int = 1,
        num_classes: int = 2,
        filters: int = 16,
        dropout: float = 0.5,
        prompt: nn.Module | None = None,  # of the bottleneck's features
    ) -> None:
        def decoding(upsampling: str) -> Decoding:
            classifier = LinearClassifier3d(filters, num_classes)
            return Decoding(VNetDecoder(filters, upsampling=upsampling), dropout, classifier)

        encoder = VNetEncoder(in_channels, filters, dropout=dropout)
        super().__init__(encoder, decoding("transposed"), decoding("linear"), prompt)


class TwoDecoderUNet(TwoDecoders):
    """U-Net with a second decoder, which upsamples bilinearly and then convolves."""

    def __init__(
        self,
        in_channels: int = 1,
        num_classes: int = 4,
        filters: Sequence[int] = (16, 32, 64, 128, 256),
        dropout: Sequence[float] = (0.05, 0.1, 0.2, 0.3, 0.5),
        prompt: nn.Module | None = None,  # of the bottleneck's features
    ) -> None:
        def decoding(upsampling: str) -> Decoding:
            return Decoding(
                UNetDecoder(filters, upsampling), 0.0, LinearClassifier2d(filters[0], num_classes)
            )

        encoder = UNetEncoder(in_channels, filters, dropout)
        super().__init__(encoder, decoding("transposed"), decoding("linear"), prompt)


class TwoNetworks(nn.Module):
    """Two networks that share nothing, for training; `network(x)` runs network A alone."""

    def __init__(self, network_a: nn.Module, network_b: nn.Module) -> None:
        super().__init__()
        self.network_a = network_a
        self.network_b = network_b

    def forward(
        self,
        x: Tensor,  # [B, in_channels, *S]
    ) -> tuple[Tensor, Tensor]:
        """Logits [B, num_classes, *S] and embedding [B, d, *S] of network A."""
        return self.network_a(x)

    def branches(
        self,
        x: Tensor,  # [B, in_channels, *S]
    ) -> Branches:
        """What both networks make of it; they share no bottleneck."""
        return Branches(self.network_a(x)[0], self.network_b(x)[0], None)
