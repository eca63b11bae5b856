"""Weights that stay as they are, so that what kernels make of them first is made once."""

from collections.abc import Callable, Hashable

from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

_in_force: "list[FixedWeights]" = []  # the innermost last


class FixedWeights:
    """Within `with fixed_weights:` the CPU's kernels keep what they make of a convolution's weight, for the calls to come.

    For a trained network that is applied to many images:

        fixed_weights = FixedWeights()
        for image in images:
            with fixed_weights, torch.no_grad():
                network(image)

    The memory, up to 5.3 times a weight's, is free again once the object or the weight is gone. A weight
    that is changed in place is noticed, unless the change goes through `.data`.
    """

    def __init__(self) -> None:
        self._made: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # by weight: its version, {purpose: made}

    def __enter__(self) -> None:
        _in_force.append(self)

    def __exit__(self, *_: object) -> None:
        _in_force.pop()

    def of_weight(self, weight: Tensor, purpose: Hashable, make: Callable[[], Tensor]) -> Tensor:
        version, made = self._made.get(weight, (None, {}))
        if version != weight._version:
            made = {}
            self._made[weight] = weight._version, made
        if purpose not in made:
            made[purpose] = make()
        return made[purpose]


def weights_are_fixed() -> bool:
    return bool(_in_force)


def made_of_weight(
    weight: Tensor,
    purpose: Hashable,  # what it is made for
    make: Callable[[], Tensor],
) -> Tensor:
    """make(), or what it gave before, where weights are fixed."""
    if not _in_force or weight.is_inference():  # whose changes nobody counts
        return make()
    return _in_force[-1].of_weight(weight, purpose, make)
