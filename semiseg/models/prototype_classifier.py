"""A classifier that compares every voxel's embedding with several prototypes per class."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from semiseg_kernels import PrototypeHead, momentum_update_, prototype_head, prototype_similarity
from semiseg_kernels.reference.common import EPSILON


class PrototypeClassifier(nn.Module):
    """K prototypes for each of C classes, moved by momentum, not by gradients (MPER eqs. 1, 2, 4 and 5).

    The prototypes are zero until `start_at_` puts them somewhere.
    """

    prototypes: Tensor  # [C, K, d] float32, a buffer

    def __init__(
        self,
        num_classes: int,  # C
        num_prototypes: int,  # K, per class
        width: int,  # d, of the embedding
        *,
        class_temperature: float = 0.1,  # τ₁ of eq. 1
        temperature: float = 0.1,  # τ₂ of eq. 5
        squared: bool = True,  # Dice's denominator, see `dice_ce`
        positive: str = "nearest",  # or "label", see `prototype_head`
        normalize: bool = True,  # eq. 5 on unit length embeddings and prototypes
        ignore_prototype: int | None = None,  # voxels whose positive is this one have no part in eq. 5
        unit_length: bool = False,  # cluster means of unit length embeddings, prototypes kept at unit length
        require_agreement: bool = False,  # only voxels predicted as their label join a cluster
    ) -> None:
        super().__init__()
        self.register_buffer("prototypes", torch.zeros(num_classes, num_prototypes, width))
        self.class_temperature = class_temperature
        self.temperature = temperature
        self.squared = squared
        self.positive = positive
        self.normalize = normalize
        self.ignore_prototype = ignore_prototype
        self.unit_length = unit_length
        self.require_agreement = require_agreement

    def forward(
        self,
        z: Tensor,  # [B, d, *S]
        labels: Tensor | None = None,  # [B, *S] integer, negative values are ignored
        regions: Tensor | None = None,  # [B, *S] uint8 or bool
        weight: Tensor | None = None,  # [B, *S], of a voxel in its cluster's sum
        *,
        num_regions: int | None = None,  # R; reading it off `regions` costs a pass
    ) -> PrototypeHead:
        """Losses and cluster sums of a training step, in one read of the embeddings; see `prototype_head`.

        Its similarity and index are None.
        """
        return prototype_head(
            z,
            self.prototypes,
            labels=labels,
            regions=regions,
            num_regions=num_regions,
            weight=weight,
            class_temperature=self.class_temperature,
            temperature=self.temperature,
            squared=self.squared,
            return_similarity=False,
            positive=self.positive,
            normalize=self.normalize,
            ignore_prototype=self.ignore_prototype,
            unit_length=self.unit_length,
            require_agreement=self.require_agreement,
        )

    def predict(
        self,
        z: Tensor,  # [B, d, *S]
    ) -> Tensor:
        """Class probabilities [B, C, *S] of eq. 1, float32 (float64 for float64 embeddings)."""
        # Similarity comes in z's dtype, and in 16 bits many cosines near 1 would be equal.
        z = z.to(torch.promote_types(z.dtype, torch.float32))
        similarity, _ = prototype_similarity(z, self.prototypes)
        return torch.softmax(similarity / self.class_temperature, dim=1)

    @torch.no_grad()
    def start_at_(
        self,
        centres: Tensor,  # [C, K, d]
    ) -> None:
        """Put the prototypes, in place, where a clustering found its centres."""
        self.prototypes.copy_(centres)
        self._keep_unit_length_()

    @torch.no_grad()
    def update_(
        self,
        cluster_sum: Tensor,  # [C, K, d] of `forward` or `cluster_mean`
        cluster_count: Tensor,  # [C, K]
        momentum: float,  # η
        foreground_only: bool = False,  # leave the prototypes of class 0 as they are
    ) -> None:
        """Move the prototypes to η p + (1 - η) mean, in place, where the count is not 0 (eq. 2)."""
        moved = slice(1, None) if foreground_only else slice(None)
        momentum_update_(self.prototypes[moved], cluster_sum[moved], cluster_count[moved], momentum)
        self._keep_unit_length_()

    def _keep_unit_length_(self) -> None:
        if self.unit_length:
            self.prototypes.copy_(functional.normalize(self.prototypes, dim=-1, eps=EPSILON))
