"""What is timed: the sizes, and each operation on inputs of that size as a trainer calls it."""

from collections.abc import Callable
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
class Operation:
    """`function(x)` on its main input x, of which backward computes the gradient if there is one."""

    x: Tensor  # [B, channels, *S]
    function: Callable[[Tensor], Results]
    differentiable: int  # the first so many results are
    forward_maps: tuple[Tensor, ...] = ()  # [B, *S] or [B, C, *S]: what else forward reads
    backward_maps: tuple[Tensor, ...] = ()  # and backward
    gemm: Callable[[Tensor], Results] | None = None  # the same results by way of a matrix product
    linear: bool = False  # its backward does not read x
    rounded: bool = False  # the reference computes in the dtype of x, the kernels in float32
    passes: int = 1  # over what it reads: with two, no result can be written before all was read

    def compulsory_bytes(self, results: Results) -> dict[str, int]:
        """What no implementation can avoid to move: inputs and upstream gradients read, results and gradient written."""
        x, returned = self.x.nbytes, sum(result.nbytes for result in results)
        forward = self.passes * (x + sum(values.nbytes for values in self.forward_maps)) + returned
        # Upstream gradients are as large as the results; an index among these is read once more.
        of_input = 0 if self.linear else x
        backward = x + self.passes * (
            of_input + sum(values.nbytes for values in self.backward_maps) + returned
        )
        return {"forward": forward, "backward": backward, "step": forward + backward}


def make_operation(
    name: str, workload: Workload, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> Operation:
    """Random embeddings as a network's, prototypes near them, and labels in two copy-paste regions."""
    if name not in OPERATIONS:
        raise ValueError(f"operation is {name!r}, accepted are {', '.join(OPERATIONS)}")
    with torch.device(device):
        return _make_operation(name, workload, dtype)


def _make_operation(name: str, workload: Workload, dtype: torch.dtype) -> Operation:
    torch.manual_seed(0)
    batch, spatial, num_classes = workload.batch, workload.spatial, workload.num_classes
    shape = (batch, *spatial)
    prototypes = torch.randn(num_classes, workload.per_class, workload.d)
    labels = torch.randint(0, num_classes, shape, dtype=torch.uint8)
    regions = torch.randint(0, 2, shape, dtype=torch.uint8)
    confident = torch.rand(shape) > 0.1
    if name == "dice_ce":
        logits = torch.randn(batch, num_classes, *spatial).to(dtype)
        return Operation(
            logits, lambda x: dice_ce(x, labels, regions=regions, num_regions=2), 2,
            forward_maps=(labels, regions), backward_maps=(labels, regions),
        )  # fmt: skip
    if name == "prompt_mix":
        logits = torch.randn(batch, num_classes, *spatial).to(dtype)
        text = torch.randn(num_classes, workload.d)
        return Operation(logits, lambda x: (prompt_mix(x, text),), 1)
    z = torch.randn(batch, workload.d, *spatial).to(dtype)
    if name == "linear_classifier":
        weight, bias = torch.randn(num_classes, workload.d), torch.randn(num_classes)
        kept = torch.randint(0, 2, (batch, workload.d)) * 2.0
        return Operation(z, lambda z: (linear_classifier(z, weight, bias, kept),), 1, rounded=True)
    if name == "linear_upsampling":
        halves = [max(side // 2, 1) for side in spatial]
        z = torch.randn(batch, 2 * workload.d, *halves).to(dtype)
        return Operation(z, lambda z: (linear_upsampling(z),), 1, linear=True)
    if name == "batch_norm_relu":
        weight, bias, *running = (torch.rand(workload.d) for _ in range(4))
        return Operation(z, lambda z: (batch_norm_relu(z, weight, bias, *running),), 1, passes=2)
    if name == "prototype_similarity":
        return Operation(
            z, lambda z: prototype_similarity(z, prototypes), 1, gemm=lambda z: gemm_similarity(z, prototypes)
        )
    if name == "prototype_info_nce":
        return Operation(
            z, lambda z: (prototype_info_nce(z, prototypes),), 1,
            gemm=lambda z: (gemm_info_nce(z, prototypes),),
        )  # fmt: skip
    if name == "cluster_mean":
        return Operation(
            z, lambda z: cluster_mean(z, prototypes, labels, weight=confident), 0,
            forward_maps=(labels, confident),
        )  # fmt: skip
    if name == "masked_class_mean":
        weight = torch.rand(batch, num_classes, *spatial)
        return Operation(
            z, lambda z: (masked_class_mean(z, weight),), 1,
            forward_maps=(weight,), backward_maps=(weight,), linear=True,
        )  # fmt: skip

    def head(z: Tensor) -> Results:
        result = prototype_head(
            z,
            prototypes,
            labels=labels,
            regions=regions,
            num_regions=2,
            weight=confident,
            return_similarity=False,
        )
        assert result.ce is not None and result.dice is not None
        assert result.cluster_sum is not None and result.cluster_count is not None
        return result.ce, result.dice, result.info_nce, result.cluster_sum, result.cluster_count

    return Operation(
        z, head, 3, forward_maps=(labels, regions, confident), backward_maps=(labels, regions),
        gemm=lambda z: gemm_head(z, prototypes, labels, regions, confident),
    )  # fmt: skip


OPERATIONS = (
    "prototype_similarity", "prototype_info_nce", "prototype_head", "cluster_mean", "dice_ce", "prompt_mix",
    "masked_class_mean", "batch_norm_relu", "linear_classifier", "linear_upsampling",
)  # fmt: skip
