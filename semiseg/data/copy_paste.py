"""Bidirectional copy-paste (Bai et al., CVPR 2023): two batches mixed through a mask with a box of zeros."""

import torch
from torch import Tensor


def zero_box_mask(
    patch: tuple[int, ...],
    box: tuple[int, ...],
    generator: torch.Generator,  # on the CPU
    device: torch.device | str | None = None,
) -> Tensor:  # [*P] bool
    """Return a mask, True outside and False inside a box whose corner is uniform over all places it fits.

    Raises ValueError if the box has another number of axes than the patch or does not fit into it.
    """
    if len(box) != len(patch) or any(
        not 1 <= inner <= outer for inner, outer in zip(box, patch, strict=True)
    ):
        raise ValueError(
            f"box is {tuple(box)}, accepted are {len(patch)} sizes from 1 up to the patch {tuple(patch)}"
        )
    mask = torch.ones(patch, dtype=torch.bool, device=device)
    corner = [
        int(torch.randint(outer - inner + 1, (), generator=generator))
        for inner, outer in zip(box, patch, strict=True)
    ]
    mask[tuple(slice(start, start + size) for start, size in zip(corner, box, strict=True))] = False
    return mask


def copy_paste(
    mask: Tensor,  # [*P] bool
    outside: Tensor,  # [B, M, *P] image or [B, *P] label
    inside: Tensor,  # same shape and dtype
) -> Tensor:
    """Return outside·M + inside·(1-M), for images and labels alike."""
    if outside.shape != inside.shape or outside.dtype != inside.dtype:
        raise ValueError(
            f"inside is {inside.dtype} {tuple(inside.shape)}, "
            f"accepted is what outside is: {outside.dtype} {tuple(outside.shape)}"
        )
    return torch.where(mask, outside, inside)


def region_map(
    mask: Tensor,  # [*P] bool
    batch: int,
    labelled: str,  # "outside" or "inside": which part of the mix comes from the labelled image
) -> Tensor:  # [B, *P] uint8
    """Return 0 where a mix comes from a labelled image and 1 where it is pseudo-labelled."""
    if labelled not in ("outside", "inside"):
        raise ValueError(f"labelled is {labelled!r}, accepted are 'outside' and 'inside'")
    pseudo_labelled = ~mask if labelled == "outside" else mask
    return pseudo_labelled.byte().expand(batch, *mask.shape).contiguous()
