"""Results that the backward pass computes again instead of the forward pass keeping them."""

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor


class _Result(NamedTuple):
    tensor: weakref.ref[Tensor]
    version: int  # it counts changes in place
    compute: Callable[[], Tensor]


_results: dict[int, _Result] | None = None  # by address, inside of recomputed_results


@contextmanager
def recomputed_results() -> Iterator[None]:
    """What is computed inside keeps no result of `batch_norm_relu` for its gradient, where a kernel has computed it.

    The gradient computes it again from what batch normalisation itself keeps, to the same bits: of a convolution, batch
    normalisation and ReLU one activation stays in memory, not two, for one pass over it more. So it is with what
    `recomputable` makes of such results.
    """
    global _results
    before, _results = _results, {}
    try:
        with torch.autograd.graph.saved_tensors_hooks(_pack, _unpack):
            yield
    finally:
        _results = before


def offer_recomputation(
    result: Tensor,
    compute: Callable[[], Tensor],  # gives the result again, from tensors that the graph keeps anyway
) -> None:
    if _results is not None and result.requires_grad:
        _results[result.data_ptr()] = _Result(weakref.ref(result), result._version, compute)


def recomputable(
    function: Callable[..., Tensor],  # a quick one, without randomness
    *inputs: Tensor,
) -> Tensor:
    """function(*inputs); inside of `recomputed_results` it is not kept either, where all inputs are computed again anyway.

    On a GPU, which runs out of time rather than memory, it is kept.
    """
    result = function(*inputs)
    if result.device.type == "cpu":
        packed = [_pack(x) for x in inputs]
        if not any(isinstance(x, Tensor) for x in packed):
            offer_recomputation(result, lambda: function(*map(_unpack, packed)))
    return result


def _pack(kept: Tensor) -> Any:
    """A tensor that a gradient needs, or how to compute it."""
    found = _results.get(kept.data_ptr()) if _results else None
    result = None if found is None else found.tensor()
    if found is None or result is None:
        return kept
    # Another tensor may by now have the address of a result that is gone, or be a part of it, or it has changed.
    layouts = [(x.data_ptr(), x.dtype, x.shape, x.stride()) for x in (kept, result)]
    return found.compute if layouts[0] == layouts[1] and kept._version == found.version else kept


def _unpack(packed: Any) -> Tensor:
    return packed if isinstance(packed, Tensor) else packed()
