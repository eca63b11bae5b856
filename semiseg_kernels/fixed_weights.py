"""Weights that do not change, so that what a kernel derives from them is derived once."""

from collections.abc import Callable, Hashable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary


class _Made(NamedTuple):
    version: int  # of the weight; it counts changes in place
    memory: Tensor  # the weight's, as it lay; held so that no other takes its address
    by_purpose: dict[Hashable, Tensor]


_fixed: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # weight: _Made


def fix_weight(weight: Tensor) -> None:
    """Say that the weight of a `convolution` does not change, as in a trained network that is applied to many images.

    What the CPU's kernel derives from it for the first image is kept for the next ones, in up to 5.3 times the weight's
    memory (several times that where sides differ so much that images take tiles of several kinds), as long as the weight itself.
    A change in place that PyTorch counts is noticed, and so is other memory, as of `vector_to_parameters`, or another order
    of the same. PyTorch does not count writes through `.data` or NumPy, nor the steps of fused optimisers; so nothing is
    kept of a weight that requires a gradient, nor of one made in inference mode.
    """
    if not weight.is_inference():
        _fixed[weight] = _nothing_made(weight)


def _nothing_made(weight: Tensor) -> _Made:
    return _Made(weight._version, weight.detach(), {})


def is_fixed(weight: Tensor) -> bool:
    # A compiled graph would have to be compiled anew.
    return not torch.compiler.is_compiling() and weight in _fixed and not weight.requires_grad


def made_of_weight(
    weight: Tensor,
    purpose: Hashable,  # what it is made for
    make: Callable[[], Tensor],
) -> Tensor:
    """make(), or what it gave before, where the weight is fixed."""
    if weight.requires_grad and weight in _fixed:
        _fixed[weight].by_purpose.clear()  # the next one may find values that an optimiser changed uncounted
    if not is_fixed(weight):
        return make()
    made = _fixed[weight]
    lies = [(x.data_ptr(), x.stride()) for x in (made.memory, weight)]
    if made.version != weight._version or lies[0] != lies[1]:
        made = _fixed[weight] = _nothing_made(weight)
    if purpose not in made.by_purpose:
        made.by_purpose[purpose] = make()
    return made.by_purpose[purpose]
