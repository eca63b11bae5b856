"""Dropout of single values, whose random bits are drawn four values at a time on a CPU."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

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
