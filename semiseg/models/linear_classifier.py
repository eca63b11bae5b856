"""The linear classifier of a network, which may leave out whole channels."""

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from semiseg_kernels import linear_classifier


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
