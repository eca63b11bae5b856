"""Reference of the prototype head: everything the prototypes do in a training step."""

from typing import NamedTuple

from torch import Tensor

from .cluster_mean import cluster_sums
from .common import class_labels, cosine, dot, flatten
from .dice_ce import one_hot, region_losses
from .prototype_info_nce import contrast, nearest_prototype, nearest_prototype_of_class
from .prototype_similarity import index_dtype


class PrototypeHead(NamedTuple):
    """Results of the prototype head; None where they were not asked for or need labels."""

    similarity: Tensor | None  # [B, C, *S] z.dtype
    index: Tensor | None  # type: ignore[assignment]  # [B, C, *S] uint8 or int16; hides tuple.index
    ce: Tensor | None  # [R]
    dice: Tensor | None  # [R]
    info_nce: Tensor  # scalar
    cluster_sum: Tensor | None  # [C, K, d]
    cluster_count: Tensor | None  # [C, K] float64


def prototype_head(
    z: Tensor,  # [B, d, *S]
    prototypes: Tensor,  # [C, K, d]
    *,
    labels: Tensor | None = None,  # [B, *S]
    regions: Tensor | None = None,  # [B, *S]
    num_regions: int | None = None,
    weight: Tensor | None = None,  # [B, *S]
    class_temperature: float = 0.1,
    temperature: float = 0.1,
    squared: bool = True,
    return_similarity: bool = True,
    positive: str = "nearest",
    normalize: bool = True,
    ignore_prototype: int | None = None,
    unit_length: bool = False,
    require_agreement: bool = False,
) -> PrototypeHead:
    num_classes, per_class = prototypes.shape[:2]
    flat_z = flatten(z)
    cosines = cosine(flat_z, prototypes)
    similarity, index = cosines.max(dim=2)  # [B, C, N]

    nearest = nearest_prototype(cosines)
    keep = nearest >= 0
    ce = dice = cluster_sum = cluster_count = None
    if labels is not None:
        flat_labels = class_labels(labels, num_classes)
        keep = flat_labels >= 0
        log_probability = (similarity / class_temperature).log_softmax(dim=1)
        target = one_hot(flat_labels, num_classes).to(similarity.dtype)
        ce, dice = region_losses(log_probability, target, keep, regions, num_regions, squared, 0)
        cluster_sum, cluster_count = cluster_sums(
            flat_z, cosines, flat_labels, weight, unit_length, require_agreement
        )
        if positive == "label":
            nearest = nearest_prototype_of_class(cosines, flat_labels)
    if ignore_prototype is not None:
        keep = keep & (nearest != ignore_prototype)
    info_nce = contrast(cosines if normalize else dot(flat_z, prototypes), nearest, keep, temperature)

    if not return_similarity:
        return PrototypeHead(None, None, ce, dice, info_nce, cluster_sum, cluster_count)
    shape = (z.shape[0], num_classes, *z.shape[2:])
    return PrototypeHead(
        similarity.reshape(shape).to(z.dtype),
        index.reshape(shape).to(index_dtype(per_class)),
        ce, dice, info_nce, cluster_sum, cluster_count,
    )  # fmt: skip
