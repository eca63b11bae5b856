"""Dice and cross-entropy per region, from logits."""

from typing import Any

import torch
from torch import Tensor

from . import backends, checks, process_group, reference
from .differentiation import once_differentiable
from .reference.dice_ce import DICE_SMOOTH, DiceCE, count_regions


def dice_ce(
    logits: Tensor,  # [B, C, *S]
    target: Tensor,  # [B, *S] integer labels, or [B, C, *S] probabilities
    *,
    regions: Tensor | None = None,  # [B, *S]
    num_regions: int | None = None,
    temperature: float = 1.0,
    squared: bool = True,
    include_background: bool = True,
) -> DiceCE:  # ce [R], dice [R]
    """Cross-entropy and Dice loss of softmax(logits / temperature) per region (MPER eq. 4, VCLIPSeg eq. 6).

        ce[r]   = mean over the voxels of region r of -sum_c y_c log p_c
        dice[r] = 1 - mean_c (2 sum p_c y_c + s) / (sum p_c^2 + sum y_c^2 + s),  s = 1e-5,
                  with sums over the region's voxels of the whole batch, of p_c and y_c themselves if not squared

    logits: float32, bfloat16 or float16 (float64 runs on the reference). Contiguous and channels-last are
        read in place, other strides are copied first.
    target: labels of any integer dtype, negative ones are left out; or probabilities y in floating point, to
        which no gradient flows.
    regions: uint8 in 0..R-1, or bool; one region by default.
    num_regions: R. Left out, it is regions.max() + 1, which costs one more read and, on a GPU, a
        synchronisation, and breaks a compiled graph: pass it in training.
    squared: Dice's denominator is V-Net's, or has no squares.
    include_background: Dice's mean is over all classes, or over all but class 0.

    ce and dice are float32 [R], 0 for a region without voxels, differentiable in the logits. For Dice of
    each image by itself, number the regions by image. Raises ValueError on wrong shapes or dtypes, without
    background where there is no other class, and on a CPU for labels >= C or regions >= R.
    """
    checks.check_voxels("logits", logits)
    checks.check_tensor("target", target)
    if target.is_floating_point():
        checks.check_dtype("target", target, (*checks.KERNEL_DTYPES, logits.dtype))
        checks.check_shape("target", target, tuple(logits.shape))
        checks.check_device("target", target, logits)
    else:
        checks.check_per_voxel("target", target, logits, checks.INTEGER_DTYPES)
    checks.check_regions(regions, num_regions, logits)
    checks.check_positive("temperature", temperature)
    if not include_background and logits.shape[1] < 2:
        raise ValueError("include_background is False, accepted of logits with one class is True")
    backend = backends.select("dice_ce", logits, logits.shape[1], 1, logits.shape[1])
    if backend == "reference":
        return reference.dice_ce(
            logits,
            target,
            regions=regions,
            num_regions=num_regions,
            temperature=temperature,
            squared=squared,
            include_background=include_background,
        )
    ce, dice = _DiceCE.apply(
        logits,
        target.detach() if target.is_floating_point() else backends.as_kernel_input(target),
        backends.as_kernel_input(regions),
        count_regions(regions, num_regions),
        float(temperature),
        squared,
        0 if include_background else 1,
        backend,
    )
    return DiceCE(ce, dice)


def statistics_size(num_regions: int, num_classes: int) -> int:
    """Per region a voxel count, and per class the sums of p * y, p^2 and y^2, or p and y."""
    return num_regions * (1 + 3 * num_classes)


def voxel_counts(
    statistics: Tensor,  # [R * (1 + 3 C)]
    num_classes: int,
) -> Tensor:  # [R]
    return statistics.view(-1, 1 + 3 * num_classes)[:, 0]


def losses_of_sums(
    ce_sums: Tensor,  # [R]
    statistics: Tensor,  # [R * (1 + 3 C)]
    num_classes: int,
    first_class: int = 0,  # of those in Dice
) -> tuple[Tensor, Tensor]:  # ce [R], dice [R]
    """The losses of a joined batch from its sums."""
    sums = statistics.view(-1, 1 + 3 * num_classes)[:, 1:]
    overlap, predicted, target = sums.chunk(3, dim=1)  # [R, C] each
    scores = (2 * overlap + DICE_SMOOTH) / (predicted + target + DICE_SMOOTH)
    dice = 1 - scores[:, first_class:].mean(dim=1)
    return process_group.mean(ce_sums, voxel_counts(statistics, num_classes)), dice.float()


class _DiceCE(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        target: Tensor,
        regions: Tensor | None,
        num_regions: int,
        temperature: float,
        squared: bool,
        first_class: int,
        backend: str,
    ) -> tuple[Tensor, Tensor]:
        options = (num_regions, temperature, squared, first_class, backend)
        ce, dice, statistics = torch.ops.semiseg_kernels.dice_ce_forward(logits, target, regions, *options)
        ctx.group = process_group.current_group()
        if ctx.group is not None:
            num_classes = logits.shape[1]
            ce_sums = ce * voxel_counts(statistics, num_classes)
            ce_sums, statistics = process_group.all_reduce(ctx.group, ce_sums, statistics)
            ce, dice = losses_of_sums(ce_sums, statistics, num_classes, first_class)
        ctx.save_for_backward(logits, target, regions, statistics)
        ctx.options = options
        return ce, dice

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_ce: Tensor, grad_dice: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.group is not None:
            grad_ce, grad_dice = process_group.all_reduce(ctx.group, grad_ce, grad_dice)
        grad_logits = torch.ops.semiseg_kernels.dice_ce_backward(
            grad_ce.contiguous(), grad_dice.contiguous(), *ctx.saved_tensors, *ctx.options
        )
        return grad_logits, *[None] * 7


def _fake_forward(
    logits: Tensor,
    target: Tensor,
    regions: Tensor | None,
    num_regions: int,
    *options: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        logits.new_empty((num_regions,), dtype=torch.float32),
        logits.new_empty((num_regions,), dtype=torch.float32),
        logits.new_empty((statistics_size(num_regions, logits.shape[1]),), dtype=torch.float64),
    )


def _fake_backward(grad_ce: Tensor, grad_dice: Tensor, logits: Tensor, *rest: Any) -> Tensor:
    return torch.empty_like(logits)


_OPTIONS = "SymInt num_regions, float temperature, bool squared, int first_class, str backend"
backends.register(
    f"dice_ce_forward(Tensor logits, Tensor target, Tensor? regions, {_OPTIONS}) -> (Tensor, Tensor, Tensor)",
    _fake_forward,
)
backends.register(
    "dice_ce_backward(Tensor grad_ce, Tensor grad_dice, Tensor logits, Tensor target, Tensor? regions, "
    f"Tensor statistics, {_OPTIONS}) -> Tensor",
    _fake_backward,
)
