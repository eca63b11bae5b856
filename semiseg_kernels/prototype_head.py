"""Prototype head: everything the prototypes do in a training step, in one read of the embeddings."""

from typing import Any

import torch
from torch import Tensor, distributed

from . import backends, checks, process_group, reference
from .dice_ce import losses_of_sums, statistics_size, voxel_counts
from .differentiation import once_differentiable
from .reference.dice_ce import count_regions
from .reference.prototype_head import PrototypeHead
from .reference.prototype_similarity import index_dtype


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
    """All that MPER's prototypes do in a training step, in one read of the embeddings and one more backward.

    MPER eq. 1, 2, 4 and 5.

    similarity, index: as `prototype_similarity`.
    ce, dice: cross-entropy and Dice loss of softmax_c(similarity_c / class_temperature) against the labels,
        per region, as `dice_ce`.
    info_nce: as `prototype_info_nce` without weights, over the voxels whose label is not negative.
    cluster_sum, cluster_count: as `cluster_mean` with `weight`, `unit_length` and `require_agreement`.

    z: float32, bfloat16 or float16 (float64 runs on the reference). Contiguous and channels-last are read in
        place, other strides are copied first.
    prototypes: float32 or z's dtype; no gradient flows to them.
    labels: any integer dtype, negative ones are left out. Without labels ce, dice, cluster_sum and
        cluster_count are None, and regions and weight must be None.
    regions: uint8 in 0..R-1, or bool; one region by default. With more than two, CUDA reads the embeddings twice
        forward, with more than four Triton reads them once for every four.
    num_regions: R. Left out, it is regions.max() + 1, which costs one more read and, on a GPU, a
        synchronisation, and breaks a compiled graph: pass it in training.
    weight: bool, uint8 or floating point; of the cluster sums only.
    class_temperature, temperature: of ce and dice, and of info_nce.
    squared: of Dice's denominator, as in `dice_ce`.
    return_similarity: False leaves similarity and index None and saves writing them.
    positive: InfoNCE's positive; "nearest": the nearest of all C * K prototypes; "label": the nearest of the
        label's class.
    normalize, ignore_prototype: as in `prototype_info_nce`.

    similarity, ce, dice and info_nce are differentiable in z. Raises ValueError on wrong shapes or dtypes,
    and on a CPU for labels >= C or regions >= R.
    """
    checks.check_prototypes(z, prototypes)
    checks.check_per_voxel("labels", labels, z, checks.INTEGER_DTYPES)
    checks.check_regions(regions, num_regions, z)
    checks.check_per_voxel("weight", weight, z, (*checks.WEIGHT_DTYPES, z.dtype))
    checks.check_positive("class_temperature", class_temperature)
    checks.check_positive("temperature", temperature)
    checks.check_choice("positive", positive, ("nearest", "label"))
    checks.check_ignore_prototype(ignore_prototype, prototypes)
    if labels is None:
        checks.check_absent_without_labels(
            regions=regions is not None, weight=weight is not None, positive=positive == "label"
        )
    backend = backends.select("prototype_head", z, *prototypes.shape)
    if backend == "reference":
        return reference.prototype_head(
            z, prototypes, labels=labels, regions=regions, num_regions=num_regions, weight=weight,
            class_temperature=class_temperature, temperature=temperature, squared=squared,
            return_similarity=return_similarity, positive=positive, normalize=normalize, ignore_prototype=ignore_prototype,
            unit_length=unit_length, require_agreement=require_agreement,
        )  # fmt: skip
    similarity, index, ce, dice, info_nce, cluster_sum, cluster_count = _PrototypeHead.apply(
        z,
        prototypes.detach().contiguous(),
        backends.as_kernel_input(labels),
        backends.as_kernel_input(regions),
        backends.as_kernel_input(weight),
        count_regions(regions, num_regions),
        float(class_temperature),
        float(temperature),
        squared,
        return_similarity,
        positive,
        normalize,
        -1 if ignore_prototype is None else ignore_prototype,
        unit_length,
        require_agreement,
        backend,
    )
    has_labels = labels is not None
    return PrototypeHead(
        similarity if return_similarity else None,
        index if return_similarity else None,
        ce if has_labels else None,
        dice if has_labels else None,
        info_nce,
        cluster_sum if has_labels else None,
        cluster_count if has_labels else None,
    )


class _PrototypeHead(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        z: Tensor,
        prototypes: Tensor,
        labels: Tensor | None,
        regions: Tensor | None,
        weight: Tensor | None,
        num_regions: int,
        class_temperature: float,
        temperature: float,
        squared: bool,
        return_similarity: bool,
        positive: str,
        normalize: bool,
        ignore_prototype: int,
        unit_length: bool,
        require_agreement: bool,
        backend: str,
    ) -> tuple[Tensor, ...]:
        results = torch.ops.semiseg_kernels.prototype_head_forward(
            z, prototypes, labels, regions, weight, num_regions, class_temperature, temperature,
            squared, return_similarity, positive, normalize, ignore_prototype, unit_length, require_agreement, backend,
        )  # fmt: skip
        ctx.group = process_group.current_group()
        if ctx.group is not None:
            results = _join(ctx.group, results, prototypes.shape[0])
        *results, statistics = results
        _, index, _, _, _, cluster_sum, cluster_count = results
        ctx.mark_non_differentiable(index, cluster_sum, cluster_count)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(z, prototypes, labels, regions, statistics)
        ctx.present = (return_similarity, labels is not None, labels is not None, True)
        ctx.options = (
            num_regions, class_temperature, temperature, squared, positive, normalize, ignore_prototype, backend
        )  # fmt: skip
        return tuple(results)

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any,
        grad_similarity: Tensor | None,
        grad_index: None,
        grad_ce: Tensor | None,
        grad_dice: Tensor | None,
        grad_info_nce: Tensor | None,
        *_: None,
    ) -> tuple[Tensor | None, ...]:
        # Under torch.compile absent gradients arrive as zeros, also those of absent results.
        gradients = [
            gradient.contiguous() if gradient is not None and present else None
            for gradient, present in zip(
                (grad_similarity, grad_ce, grad_dice, grad_info_nce), ctx.present, strict=True
            )
        ]
        if ctx.group is not None:
            of_losses = {i: x for i, x in enumerate(gradients) if i > 0 and x is not None}
            summed = process_group.all_reduce(ctx.group, *of_losses.values())
            for i, gradient in zip(of_losses, summed, strict=True):
                gradients[i] = gradient
        grad_z = torch.ops.semiseg_kernels.prototype_head_backward(
            *gradients, *ctx.saved_tensors, *ctx.options
        )
        return grad_z, *[None] * 15


def _join(
    group: distributed.ProcessGroup,
    results: tuple[Tensor, ...],
    num_classes: int,
) -> tuple[Tensor, ...]:
    """The raw operation's results with the losses, cluster sums and statistics of all processes of a group."""
    similarity, index, ce, dice, info_nce, cluster_sum, cluster_count, statistics = results
    ce_sums = ce * voxel_counts(statistics[:-1], num_classes)
    info_nce_sum, ce_sums, cluster_sum, cluster_count, statistics = process_group.all_reduce(
        group, info_nce * statistics[-1], ce_sums, cluster_sum, cluster_count, statistics
    )
    ce, dice = losses_of_sums(ce_sums, statistics[:-1], num_classes)
    info_nce = process_group.mean(info_nce_sum, statistics[-1])
    return similarity, index, ce, dice, info_nce, cluster_sum, cluster_count, statistics


def _fake_forward(
    z: Tensor,
    prototypes: Tensor,
    labels: Tensor | None,
    regions: Tensor | None,
    weight: Tensor | None,
    num_regions: int,
    class_temperature: float,
    temperature: float,
    squared: bool,
    return_similarity: bool,
    *options: Any,
) -> tuple[Tensor, ...]:
    num_classes, per_class = prototypes.shape[:2]
    voxels = (z.shape[0], num_classes, *z.shape[2:]) if return_similarity else (0,)
    has_labels = labels is not None
    regions_shape = (num_regions,) if has_labels else (0,)
    statistics = statistics_size(num_regions, num_classes) if has_labels else 0
    return (
        z.new_empty(voxels),
        z.new_empty(voxels, dtype=index_dtype(per_class)),
        z.new_empty(regions_shape, dtype=torch.float32),
        z.new_empty(regions_shape, dtype=torch.float32),
        z.new_empty((), dtype=torch.float32),
        z.new_empty(prototypes.shape if has_labels else (0,), dtype=torch.float32),
        z.new_empty(prototypes.shape[:2] if has_labels else (0,), dtype=torch.float64),
        z.new_empty((1 + statistics,), dtype=torch.float64),
    )


def _fake_backward(
    grad_similarity: Tensor | None,
    grad_ce: Tensor | None,
    grad_dice: Tensor | None,
    grad_info_nce: Tensor | None,
    z: Tensor,
    *rest: Any,
) -> Tensor:
    return torch.empty_like(z)


_TENSORS = "Tensor z, Tensor prototypes, Tensor? labels, Tensor? regions"
backends.register(
    f"prototype_head_forward({_TENSORS}, Tensor? weight, SymInt num_regions, float class_temperature, "
    "float temperature, bool squared, bool return_similarity, str positive, bool normalize, int ignore_prototype, "
    "bool unit_length, bool require_agreement, str backend) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _fake_forward,
)
backends.register(
    "prototype_head_backward(Tensor? grad_similarity, Tensor? grad_ce, Tensor? grad_dice, "
    f"Tensor? grad_info_nce, {_TENSORS}, Tensor statistics, SymInt num_regions, float class_temperature, "
    "float temperature, bool squared, str positive, bool normalize, int ignore_prototype, str backend) -> Tensor",
    _fake_backward,
)
