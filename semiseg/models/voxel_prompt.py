"""The voxel-wise prompt: the classes' text embeddings, mixed for every voxel and fused with its features."""

from collections.abc import Sequence

from torch import Tensor, nn

from semiseg.models.batch_norm import NEGATIVE_SLOPE, BatchNormReLU
from semiseg_kernels import prompt_conv

CONVOLUTION_OF_DIMENSION: dict[int, type[nn.Conv2d] | type[nn.Conv3d]] = {2: nn.Conv2d, 3: nn.Conv3d}


class VoxelPrompt(nn.Module):
    """The voxel-wise prompts module, VWPM (VCLIPSeg eqs. 1 to 3).

    v = softmax(controller(f)) over the classes, prompt = Σ_c v_c · linear(t_c), f_p = conv(cat(f, prompt)),
    the last folded so that no prompt is ever formed, with batch normalisation and LeakyReLU behind it. The
    controller: 3x3(x3) convolution, batch normalisation and LeakyReLU, two linear layers with GELU between.
    """

    text: Tensor  # [C, E], a buffer

    def __init__(
        self,
        text: Tensor,  # [C, E], frozen
        width: int,  # F, channels of the features
        *,
        dimensions: int,  # 2 or 3
        prompt_width: int = 256,  # of the text embeddings when they are mixed
        controller_widths: Sequence[int] = (64, 16),  # of its convolution and its hidden layer
        fusion_kernel: int = 3,  # side of the convolution, odd
    ) -> None:
        super().__init__()
        convolution = CONVOLUTION_OF_DIMENSION[dimensions]
        local, hidden = controller_widths
        self.register_buffer("text", text.clone())
        self.text_projection = nn.Linear(text.shape[1], prompt_width)
        # A bias ahead of batch normalisation has no effect.
        self.controller = nn.Sequential(
            convolution(width, local, kernel_size=3, padding=1, bias=False),
            BatchNormReLU(local, NEGATIVE_SLOPE),
            convolution(local, hidden, kernel_size=1),
            nn.GELU(),
            convolution(hidden, len(text), kernel_size=1),
        )
        self.fusion = convolution(width + prompt_width, width, fusion_kernel, padding="same", bias=False)
        self.activation = BatchNormReLU(width, NEGATIVE_SLOPE)

    def forward(
        self,
        features: Tensor,  # [B, F, *S]
    ) -> Tensor:  # [B, F, *S]
        """Features with the prompts fused into them."""
        text = self.text_projection(self.text)
        return self.activation(
            prompt_conv(features, self.controller(features), text, self.fusion.weight, padding="same")
        )
