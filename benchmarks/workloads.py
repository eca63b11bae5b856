"""What is timed: the sizes, and each operation on inputs of that size as a trainer calls it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from gemm import gemm_head, gemm_info_nce, gemm_similarity
from torch import Tensor

from semiseg_kernels import (
    batch_norm_relu,
    cluster_mean,
    dice_ce,
    linear_classifier,
    linear_upsampling,
    masked_class_mean,
    prompt_mix,
    prototype_head,
    prototype_info_nce,
    prototype_similarity,
)

Results = tuple[Tensor, ...]


@dataclass(frozen=True)
class Workload:
    """A batch of embeddings [B, d, *S] with C classes of K prototypes."""

    batch: int
    spatial: tuple[int, ...]
    num_classes: int
    per_class: int = 3
    d: int = 16

    @property
    def voxels(self) -> int:
        return self.batch * torch.Size(self.spatial).numel()


SIZES = {
    "full": {"3d": Workload(4, (112, 112, 80), 2), "2d": Workload(24, (256, 256), 4)},
    "tiny": {"3d": Workload(2, (13, 7, 5), 2), "2d": Workload(3, (17, 9), 4)},
}
GPU_SIZES = {
    "full": {
        "LA": SIZES["full"]["3d"],
        "ACDC": SIZES["full"]["2d"],
        "wide": Workload(1, (100, 100, 100), 14, per_class=8, d=64),
        "very wide": Workload(1, (64, 64, 64), 16, per_class=16, d=512),
    },
    "tiny": {
        "LA": SIZES["tiny"]["3d"],
        "ACDC": SIZES["tiny"]["2d"],
        "wide": Workload(1, (5, 5, 5), 14, per_class=8, d=64),
        "very wide": Workload(1, (4, 4, 4), 16, per_class=16, d=512),
    },
}


@dataclass(frozen=True)
class Traffic:
    """Bytes of maps that are read and written."""

    read: int
    written: int

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(self.read + other.read, self.written + other.written)

    @property
    def total(self) -> int:
        return self.read + self.written


@dataclass(frozen=True)
class Operation:
    """`function(x)` on its main input x; backward computes the gradients of x and of what is trained."""

    x: Tensor  # [B, channels, *S]
    function: Callable[[Tensor], Results]
    differentiable: int  # the first so many results are
    trained: tuple[Tensor, ...] = ()  # the parameters, which a trainer wants the gradients of
    forward_maps: tuple[Tensor, ...] = ()  # [B, *S] or [B, C, *S]: what else forward reads
    backward_maps: tuple[Tensor, ...] = ()  # and backward
    gemm: Callable[[Tensor], Results] | None = None  # the same results by way of a matrix product
    linear: bool = False  # its backward does not read x
    passes: int = 1  # over what it reads: with two, no result can be written before all was read

    def compulsory_traffic(self, results: Results) -> dict[str, Traffic]:
        """What no implementation can avoid to move: inputs and upstream gradients read, results and gradient written."""
        x, returned = self.x.nbytes, sum(result.nbytes for result in results)
        forward = Traffic(self.passes * (x + sum(values.nbytes for values in self.forward_maps)), returned)
        # Upstream gradients are as large as the results; an index among these is read once more.
        of_input = 0 if self.linear else x
        maps = sum(values.nbytes for values in self.backward_maps)
        backward = Traffic(self.passes * (of_input + maps + returned), x)
        return {"forward": forward, "backward": backward, "step": forward + backward}


class Inputs:
    """Random embeddings as a network's, prototypes, and labels in two copy-paste regions."""

    def __init__(self, workload: Workload, dtype: torch.dtype) -> None:
        torch.manual_seed(0)
        self.workload, self.dtype = workload, dtype
        shape = (workload.batch, *workload.spatial)
        self.prototypes = torch.randn(workload.num_classes, workload.per_class, workload.d)
        self.labels = torch.randint(0, workload.num_classes, shape, dtype=torch.uint8)
        self.regions = torch.randint(0, 2, shape, dtype=torch.uint8)
        self.confident = torch.rand(shape) > 0.1

    def values(self, channels: int, spatial: Sequence[int] | None = None) -> Tensor:
        """[B, channels, *S]"""
        return torch.randn(self.workload.batch, channels, *(spatial or self.workload.spatial)).to(self.dtype)

    @property
    def logits(self) -> Tensor:
        return self.values(self.workload.num_classes)

    @property
    def z(self) -> Tensor:
        return self.values(self.workload.d)


def _prototype_similarity(inputs: Inputs) -> Operation:
    prototypes = inputs.prototypes
    return Operation(
        inputs.z,
        lambda z: prototype_similarity(z, prototypes),
        1,
        gemm=lambda z: gemm_similarity(z, prototypes),
    )


def _prototype_info_nce(inputs: Inputs) -> Operation:
    prototypes = inputs.prototypes
    return Operation(
        inputs.z,
        lambda z: (prototype_info_nce(z, prototypes),),
        1,
        gemm=lambda z: (gemm_info_nce(z, prototypes),),
    )


def _prototype_head(inputs: Inputs) -> Operation:
    prototypes, labels, regions, confident = inputs.prototypes, inputs.labels, inputs.regions, inputs.confident

    def head(z: Tensor) -> Results:
        result = prototype_head(
            z, prototypes, labels=labels, regions=regions, num_regions=2, weight=confident, return_similarity=False
        )
        assert result.ce is not None and result.dice is not None
        assert result.cluster_sum is not None and result.cluster_count is not None
        return result.ce, result.dice, result.info_nce, result.cluster_sum, result.cluster_count

    return Operation(
        inputs.z,
        head,
        3,
        forward_maps=(labels, regions, confident),
        backward_maps=(labels, regions),
        gemm=lambda z: gemm_head(z, prototypes, labels, regions, confident),
    )


def _cluster_mean(inputs: Inputs) -> Operation:
    prototypes, labels, confident = inputs.prototypes, inputs.labels, inputs.confident
    return Operation(
        inputs.z,
        lambda z: cluster_mean(z, prototypes, labels, weight=confident),
        0,
        forward_maps=(labels, confident),
    )


def _dice_ce(inputs: Inputs) -> Operation:
    labels, regions = inputs.labels, inputs.regions
    return Operation(
        inputs.logits,
        lambda x: dice_ce(x, labels, regions=regions, num_regions=2),
        2,
        forward_maps=(labels, regions),
        backward_maps=(labels, regions),
    )


def _prompt_mix(inputs: Inputs) -> Operation:
    text = torch.randn(inputs.workload.num_classes, inputs.workload.d).requires_grad_()
    return Operation(inputs.logits, lambda x: (prompt_mix(x, text),), 1, trained=(text,))


def _masked_class_mean(inputs: Inputs) -> Operation:
    workload = inputs.workload
    weight = torch.rand(workload.batch, workload.num_classes, *workload.spatial)
    return Operation(
        inputs.z,
        lambda z: (masked_class_mean(z, weight),),
        1,
        forward_maps=(weight,),
        backward_maps=(weight,),
        linear=True,
    )


def _batch_norm_relu(inputs: Inputs) -> Operation:
    weight, bias, *running = (torch.rand(inputs.workload.d) for _ in range(4))
    trained = weight.requires_grad_(), bias.requires_grad_()
    return Operation(
        inputs.z, lambda z: (batch_norm_relu(z, *trained, *running),), 1, trained=trained, passes=2
    )


def _linear_classifier(inputs: Inputs) -> Operation:
    workload = inputs.workload
    shapes = (workload.num_classes, workload.d), (workload.num_classes,)
    trained = tuple(torch.randn(shape).requires_grad_() for shape in shapes)
    kept = torch.randint(0, 2, (workload.batch, workload.d)) * 2.0
    return Operation(inputs.z, lambda z: (linear_classifier(z, *trained, kept),), 1, trained=trained)


def _linear_upsampling(inputs: Inputs) -> Operation:
    workload = inputs.workload
    halves = [max(side // 2, 1) for side in workload.spatial]
    return Operation(
        inputs.values(2 * workload.d, halves), lambda z: (linear_upsampling(z),), 1, linear=True
    )


OPERATIONS: dict[str, Callable[[Inputs], Operation]] = {
    "prototype_similarity": _prototype_similarity,
    "prototype_info_nce": _prototype_info_nce,
    "prototype_head": _prototype_head,
    "cluster_mean": _cluster_mean,
    "dice_ce": _dice_ce,
    "prompt_mix": _prompt_mix,
    "masked_class_mean": _masked_class_mean,
    "batch_norm_relu": _batch_norm_relu,
    "linear_classifier": _linear_classifier,
    "linear_upsampling": _linear_upsampling,
}


def make_operation(
    name: str, workload: Workload, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> Operation:
    """An operation on random inputs of the size of a workload."""
    if name not in OPERATIONS:
        raise ValueError(f"operation is {name!r}, accepted are {', '.join(OPERATIONS)}")
    with torch.device(device):
        return OPERATIONS[name](Inputs(workload, dtype))
