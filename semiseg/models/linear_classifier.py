"""The linear classifier of a network, with dropout of whole channels before it."""

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from semiseg_kernels import linear_classifier


class ChannelDropout(nn.Module):
    """Dropout of whole channels of an image, drawn apart from what it is applied to.

    Raises ValueError for a probability outside 0 to below 1.
    """

    def __init__(
        self,
        probability: float,  # that a channel is dropped, 0 to below 1
    ) -> None:
        super().__init__()
        if not 0 <= probability < 1:
            raise ValueError(f"dropout is {probability}, accepted are probabilities from 0 to below 1")
        self.probability = probability

    def scale(
        self,
        x: Tensor,  # [B, channels, *S]
    ) -> Tensor | None:  # [B, channels]
        """What every channel is multiplied by, newly drawn; None where nothing is dropped: in evaluation, or at 0."""
        if not self.training or self.probability == 0:
            return None
        kept = 1 - self.probability
        return x.new_empty(x.shape[:2]).bernoulli_(kept).div_(kept)

    def forward(
        self,
        x: Tensor,  # [B, channels, *S]
    ) -> Tensor:  # [B, channels, *S]
        scale = self.scale(x)
        return x if scale is None else x * scale.view(*scale.shape, *[1] * (x.dim() - 2))

    def extra_repr(self) -> str:
        return str(self.probability)


class _LinearClassifier(_ConvNd):
    """A convolution of side 1 that `linear_classifier` computes."""

    def forward(
        self,
        embedding: Tensor,  # [B, d, *S]
        channel_scale: Tensor | None = None,  # [B, d], of a ChannelDropout
    ) -> Tensor:  # [B, C, *S]
        """Logits, float32 or float64."""
        assert self.bias is not None  # it is made with one
        return linear_classifier(embedding, self.weight.flatten(1), self.bias, channel_scale)


class LinearClassifier2d(_LinearClassifier, nn.Conv2d):
    def __init__(self, width: int, num_classes: int) -> None:
        super().__init__(width, num_classes, kernel_size=1)


class LinearClassifier3d(_LinearClassifier, nn.Conv3d):
    def __init__(self, width: int, num_classes: int) -> None:
        super().__init__(width, num_classes, kernel_size=1)
