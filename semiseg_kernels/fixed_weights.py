"""Weights that stay as they are, so that what a kernel makes of one before it computes is made once."""

from collections.abc import Callable, Hashable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary


class _Made(NamedTuple):
    version: int  # of the weight; it counts changes in place
    by_purpose: dict[Hashable, Tensor]


_fixed: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # weight: _Made


def fix_weight(weight: Tensor) -> None:
    """Say that the weight of a `convolution` stays as it is, as in a trained network that is applied to many images.

    What the CPU's kernel makes of it for the first image is kept for the next ones, in up to 5.3 times the weight's memory
    (twice that where sides differ so much that images take tiles of both kinds), as long as the weight itself. A change in
    place is noticed all the same, unless PyTorch does not count it: through `.data` or NumPy. Of weights made in inference
    mode nothing is kept.
    """
    if not weight.is_inference():
        _fixed[weight] = _Made(weight._version, {})


def is_fixed(weight: Tensor) -> bool:
    # A compiled graph would have to be compiled anew.
    return not torch.compiler.is_compiling() and weight in _fixed


def made_of_weight(
    weight: Tensor,
    purpose: Hashable,  # what it is made for
    make: Callable[[], Tensor],
) -> Tensor:
    """make(), or what it gave before, where the weight is fixed."""
    if not is_fixed(weight):
        return make()
    made = _fixed[weight]
    if made.version != weight._version:
        made = _fixed[weight] = _Made(weight._version, {})
    if purpose not in made.by_purpose:
        made.by_purpose[purpose] = make()
    return made.by_purpose[purpose]
