"""Largest components in Triton.

kept[v] = label[v] where v lies in the largest component of its class, the first in scan order on ties; 0 elsewhere

Union-find on voxels, all lanes of a program together. A parent never comes after its child: a component's root is its
first voxel, in whatever order the lanes join them.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from semiseg_kernels.layouts import volume_sides
from semiseg_kernels.triton.launch import launch

BLOCK = 128  # voxels of a program, which is a single warp: its lanes wait for no others
VOXEL_BITS = tl.constexpr(0x7FFFFFFF)  # of a rank, in which the earlier of two voxels is the larger
_SIZES = ["Z", "Y", "X", "C", "tiles_per_image"]


@triton.jit
def _locate(size, tiles_per_image, BLOCK: tl.constexpr):
    """The image, how many voxels lie before it, the program's voxels [BLOCK], and which of them exist."""
    image = tl.program_id(0) // tiles_per_image
    v = tl.program_id(0) % tiles_per_image * BLOCK + tl.arange(0, BLOCK)
    # What would lie beyond 2^31 is negative.
    return image, tl.cast(image, tl.int64) * size, v, (v >= 0) & (v < size)


@triton.jit
def _class_of(label, v, there, C):
    """Classes of the voxels that are `there`, 0 of all others and of values beyond the classes."""
    value = tl.load(label + v, mask=there, other=0).to(tl.int32)
    return tl.where(value < C, value, 0)


@triton.jit
def _later(a, b):
    return tl.maximum(a, b)


@triton.jit
def _run(label, value, v, there, X, C, BLOCK: tl.constexpr):
    """At which lane the neighbouring voxels of a class along the last axis begin."""
    lane, left = tl.arange(0, BLOCK), _class_of(label, v - 1, there & (v > 0), C)
    begins = (lane == 0) | (left != value) | (v % X == 0)
    return tl.associative_scan(tl.where(begins, lane, 0), 0, _later)


@triton.jit
def _roots(parent, v, active):
    # Other programs join components meanwhile: nothing may come from a cache of one's own.
    above = tl.where(active, tl.load(parent + v, mask=active, other=0, volatile=True), v)
    while tl.max((above != v).to(tl.int32), axis=0) > 0:
        v = above
        above = tl.where(active, tl.load(parent + v, mask=active, other=0, volatile=True), v)
    return v


@triton.jit
def _unite(parent, v, w, active):
    while tl.max(active.to(tl.int32), axis=0) > 0:
        v, w = _roots(parent, v, active), _roots(parent, w, active)
        active = active & (v != w)
        earlier, later = tl.minimum(v, w), tl.maximum(v, w)
        before = tl.atomic_min(parent + later, earlier, mask=active, sem="relaxed")
        # Where another has given it a parent meanwhile, that one has to be joined in its place.
        active = active & (before != later)
        v, w = earlier, tl.where(active, before, earlier)


@triton.jit(do_not_specialize=_SIZES)
def _start(
    label,  # [B, Z, Y, X] uint8
    parent,  # [B, Z, Y, X] int32, a voxel of the same component, itself at the root
    Z,
    Y,
    X,
    C,
    tiles_per_image,
    BLOCK: tl.constexpr,
):
    """A voxel's parent is the first of its run."""
    _, first, v, there = _locate(Z * Y * X, tiles_per_image, BLOCK)
    value = _class_of(label + first, v, there, C)
    run = _run(label + first, value, v, there, X, C, BLOCK)
    tl.store(parent + first + v, v - tl.arange(0, BLOCK) + run, mask=value != 0)


@triton.jit(do_not_specialize=_SIZES)
def _join(label, parent, Z, Y, X, C, tiles_per_image, BLOCK: tl.constexpr):
    """Within a run its voxels' neighbours overlap: only those are joined that no voxel before has met."""
    _, first, v, there = _locate(Z * Y * X, tiles_per_image, BLOCK)
    label, parent = label + first, parent + first
    value = _class_of(label, v, there, C)
    exists, x, y, z = value != 0, v % X, v // X % Y, v // X // Y
    continues = exists & (x > 0) & (_class_of(label, v - 1, exists & (x > 0), C) == value)
    _unite(parent, v, v - 1, continues & (tl.arange(0, BLOCK) == 0))
    for line in range(4):  # before in the plane, then three in the plane before
        dy, dz = tl.where(line == 0, -1, line - 2), tl.where(line == 0, 0, -1)
        opposite = v + (dz * Y + dy) * X
        inside = exists & (y + dy >= 0) & (y + dy < Y) & (z + dz >= 0)
        touches = inside & (_class_of(label, opposite, inside, C) == value)
        for dx in range(-1, 2):
            beside = inside & (x + dx >= 0) & (x + dx < X)
            beside = beside & (_class_of(label, opposite + dx, beside, C) == value)
            # The voxel before has met all but the last of the three; the middle one joins the others itself.
            joins = beside & ((dx == 0) | ~touches) & ((dx > 0) | ~continues)
            _unite(parent, v, opposite + dx, joins)


@triton.jit(do_not_specialize=_SIZES)
def _measure(
    label,
    parent,
    size,  # [B, Z, Y, X] int32 of zeros, becomes the component's number of voxels at its root
    Z,
    Y,
    X,
    C,
    tiles_per_image,
    BLOCK: tl.constexpr,
):
    """Every parent becomes the root, to whose size every run is added."""
    _, first, v, there = _locate(Z * Y * X, tiles_per_image, BLOCK)
    label, parent = label + first, parent + first
    value = _class_of(label, v, there, C)
    root, lane = _roots(parent, v, value != 0), tl.arange(0, BLOCK)
    right = _class_of(label, v + 1, there & (v % X + 1 < X), C)
    ends = (value != 0) & ((lane == BLOCK - 1) | (right != value))
    run = _run(label, value, v, there, X, C, BLOCK)
    tl.atomic_add(size + first + root, lane - run + 1, mask=ends, sem="relaxed")
    tl.store(parent + v, root, mask=value != 0)


@triton.jit(do_not_specialize=_SIZES)
def _find_largest(
    label,
    parent,
    size,
    largest,  # [B, C] int64 of zeros, becomes the highest rank of a class
    Z,
    Y,
    X,
    C,
    tiles_per_image,
    BLOCK: tl.constexpr,
):
    """Larger components rank higher, of two of one size the earlier."""
    image, first, v, there = _locate(Z * Y * X, tiles_per_image, BLOCK)
    value = _class_of(label + first, v, there, C)
    is_root = (value != 0) & (tl.load(parent + first + v, mask=value != 0, other=0) == v)
    number = tl.load(size + first + v, mask=is_root, other=0).to(tl.int64)
    rank = (number << 32) | (v ^ VOXEL_BITS).to(tl.int64)
    of_class = largest + image * C + value
    is_larger = is_root & (rank > tl.load(of_class, mask=is_root, other=0, volatile=True))
    tl.atomic_max(of_class, rank, mask=is_larger, sem="relaxed")


@triton.jit(do_not_specialize=_SIZES)
def _write(
    label,
    parent,
    largest,
    kept,  # [B, Z, Y, X] uint8
    Z,
    Y,
    X,
    C,
    tiles_per_image,
    BLOCK: tl.constexpr,
):
    image, first, v, there = _locate(Z * Y * X, tiles_per_image, BLOCK)
    value = _class_of(label + first, v, there, C)
    rank = tl.load(largest + image * C + value, mask=value != 0, other=0)
    root = tl.load(parent + first + v, mask=value != 0, other=0)
    stays = (value != 0) & (root == ((rank & VOXEL_BITS).to(tl.int32) ^ VOXEL_BITS))
    tl.store(kept + first + v, tl.where(stays, value, 0).to(tl.uint8), mask=there)


def forward(
    label: Tensor,  # [B, *S] uint8
    num_classes: int,
) -> Tensor:  # [B, *S] uint8
    label = label.contiguous()
    kept = torch.empty_like(label)
    batch, tiles_per_image = label.shape[0], triton.cdiv(label.shape[1:].numel(), BLOCK)
    parent = torch.empty(label.shape, dtype=torch.int32, device=label.device)
    size = torch.zeros_like(parent)
    largest = torch.zeros(batch, num_classes, dtype=torch.int64, device=label.device)
    for kernel, tensors in (
        (_start, {"parent": parent}),
        (_join, {"parent": parent}),
        (_measure, {"parent": parent, "size": size}),
        (_find_largest, {"parent": parent, "size": size, "largest": largest}),
        (_write, {"parent": parent, "largest": largest, "kept": kept}),
    ):
        launch(
            kernel, (batch * tiles_per_image,), label, num_warps=1, label=label, **tensors,
            **volume_sides(label), C=num_classes, tiles_per_image=tiles_per_image, BLOCK=BLOCK,
        )  # fmt: skip
    return kept
