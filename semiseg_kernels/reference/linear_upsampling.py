"""Reference of linear upsampling: PyTorch's interpolation."""

from torch import Tensor
from torch.nn.functional import interpolate


def linear_upsampling(
    x: Tensor,  # [B, C, *S], *S 2 or 3 axes
) -> Tensor:  # [B, C, *2S]
    mode = "trilinear" if x.dim() == 5 else "bilinear"
    return interpolate(x, scale_factor=2, mode=mode, align_corners=False)
