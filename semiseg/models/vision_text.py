"""Consistency of image features with text: the mean feature of every class points where its text does."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from semiseg.models.predicted_class import predicted_class
from semiseg.models.voxel_prompt import CONVOLUTION_OF_DIMENSION
from semiseg_kernels import masked_class_mean, sum_over_processes
from semiseg_kernels.reference.common import EPSILON


class VisionTextConsistency(nn.Module):
    """The vision-text consistency module, VTCM (VCLIPSeg eqs. 4 and 5), for training only.

    A projection head of two 1x1(x1) convolutions with ReLU between them maps features to unit length vectors
    of the text's width; their class means over a map of reliable voxels are compared with the text.
    """

    text: Tensor  # [C, E], a buffer

    def __init__(
        self,
        text: Tensor,  # [C, E], frozen
        width: int,  # F, channels of the features
        *,
        dimensions: int,  # 2 or 3
        heads: int = 1,  # projection heads, whose class means are averaged
    ) -> None:
        super().__init__()
        convolution = CONVOLUTION_OF_DIMENSION[dimensions]
        self.register_buffer("text", text.clone(), persistent=False)
        self.projections = nn.ModuleList(
            nn.Sequential(
                convolution(width, width, kernel_size=1),
                nn.ReLU(inplace=True),
                convolution(width, text.shape[1], kernel_size=1),
            )
            for _ in range(heads)
        )

    def forward(
        self,
        features: Tensor,  # [B, F, *S]
        weight: Tensor,  # [B, C, *S], of a voxel in the mean of each class
    ) -> Tensor:
        """Mean of 1 - cos(class mean, text) over the classes that have a voxel; 0 without any."""
        prototypes = [
            masked_class_mean(unit_vectors(projection(features).float()), weight)
            for projection in self.projections
        ]
        return text_distance(torch.stack(prototypes).mean(0), self.text, weight)


def unit_vectors(
    v: Tensor,  # [B, E, *S]
) -> Tensor:
    """v / |v| along the channels; 0, and gradient 0, where |v| < EPSILON."""
    norm = torch.linalg.vector_norm(v, dim=1, keepdim=True)
    # Clamping the norm instead would multiply the gradient there by 1 / EPSILON.
    return v / norm.masked_fill(norm < EPSILON, torch.inf)


def text_distance(
    prototypes: Tensor,  # [C, E]
    text: Tensor,  # [C, E]
    weight: Tensor,  # [B, C, *S]
) -> Tensor:
    """Eq. 5: the mean of 1 - cos(prototype, text) over the classes whose weights do not sum to 0, else 0."""
    distance = 1 - functional.cosine_similarity(prototypes, text, dim=1)
    (present,) = sum_over_processes(weight.transpose(0, 1).flatten(1).any(dim=1))
    return torch.where(present, distance, 0).sum() / present.sum().clamp_min(1)


@torch.no_grad()
def agreement_map(
    logits_a: Tensor,  # [B, C, *S]
    logits_b: Tensor,  # [B, C, *S]
    labels: Tensor,  # [B, *S] integer
    size: torch.Size,  # of the features
    resampling: str = "area",  # a coarse voxel counts by its share of such voxels; nearest picks one
) -> Tensor:  # [B, C, *size] float32
    """Where both branches predict the label, class by class, brought to the resolution of the features."""
    agree = (predicted_class(logits_a) == labels) & (predicted_class(logits_b) == labels)
    maps = []
    for c in range(logits_a.shape[1]):  # one full-size map at a time
        mask = (agree & (labels == c)).unsqueeze(1).float()
        maps.append(functional.interpolate(mask, size, mode=resampling))
    return torch.cat(maps, dim=1)
