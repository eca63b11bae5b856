"""Dropout of single values, whose random bits a CPU draws for four values at a time, and of whole channels."""

from typing import Any

import torch
from torch import Tensor, nn

from semiseg_kernels.differentiation import once_differentiable

DRAWN_TOGETHER = 4  # values for each 64 random bits
LEVELS = 2**16  # of a value's 16 bits, in which its probability is counted


class Dropout(nn.Dropout):
    """PyTorch's dropout; on a CPU its probability is rounded to a multiple of 2⁻¹⁶.

    There drawing a number for every value takes longer than the convolution before. The bits come from the global
    generator. x has any shape and floating point dtype, and the result both.
    """

    def forward(
        self,
        x: Tensor,  # [B, d, *S]
    ) -> Tensor:  # [B, d, *S]
        dropped = round(self.p * LEVELS)
        if x.device.type != "cpu" or not self.training or not 0 < dropped < LEVELS:
            return super().forward(x)
        return _Dropout.apply(x, dropped)


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


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dropped: int) -> Tensor:
        count = x.numel()
        limits = torch.iinfo(torch.int64)
        drawn = torch.randint(limits.min, limits.max, (-(-count // DRAWN_TOGETHER),)).view(torch.int16)
        kept = torch.empty_like(x, dtype=torch.bool)  # without gaps, whatever x is
        torch.ge(drawn[:count], dropped - LEVELS // 2, out=kept.as_strided((count,), (1,)))
        ctx.scale = LEVELS / (LEVELS - dropped)
        ctx.save_for_backward(kept)
        return torch.ops.aten.native_dropout_backward(x, kept, ctx.scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor, None]:
        (kept,) = ctx.saved_tensors
        return torch.ops.aten.native_dropout_backward(grad_y, kept, ctx.scale), None
