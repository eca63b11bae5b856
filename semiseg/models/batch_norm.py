"""Batch normalisation and the ReLU behind it as one layer."""

from torch import Tensor
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm

from semiseg_kernels import batch_norm_relu
from semiseg_kernels.reference.common import activate

NEGATIVE_SLOPE = 0.01  # where the networks have a leaky ReLU


class BatchNormReLU(_BatchNorm):
    """Batch normalisation of images of any number of axes, then ReLU, leaky with a slope other than 0."""

    num_batches_tracked: Tensor
    running_mean: Tensor
    running_var: Tensor
    momentum: float

    def __init__(
        self,
        num_features: int,  # channels
        negative_slope: float = 0.0,  # of the ReLU
    ) -> None:
        super().__init__(num_features)
        self.negative_slope = negative_slope

    def forward(
        self,
        x: Tensor,  # [B, channels, *S]
    ) -> Tensor:  # [B, channels, *S]
        """Normalise by the batch's statistics in training (over all processes, see `use_process_group`), else by the
        running ones."""
        if self.training:
            self.num_batches_tracked.add_(1)
            return batch_norm_relu(
                x,
                self.weight,
                self.bias,
                self.running_mean,
                self.running_var,
                momentum=self.momentum,
                epsilon=self.eps,
                negative_slope=self.negative_slope,
            )
        normalised = functional.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps
        )
        return activate(normalised, self.negative_slope)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, negative_slope={self.negative_slope}"
