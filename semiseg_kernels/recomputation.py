"""Results that the backward pass computes again instead of the forward pass keeping them."""

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class _SavedTensor:
    """A saved tensor that must not change; PyTorch does not check the version of what a hook keeps."""

    tensor: Tensor
    version: int  # it counts changes in place

    def __call__(self) -> Tensor:
        if self.tensor._version != self.version:
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an inplace operation: "
                f"a tensor of shape {list(self.tensor.shape)} is at version {self.tensor._version}, not {self.version}"
            )
        return self.tensor


class _Result(NamedTuple):
    tensor: weakref.ref[Tensor]
    version: int
    compute: Callable[[], Tensor]


_results: dict[int, _Result] | None = None  # by address, inside of recomputed_results


@contextmanager
def recomputed_results() -> Iterator[None]:
    """What is computed inside keeps no result of `batch_norm_relu` for its gradient, where a kernel has computed it.

    The gradient computes it again from what batch normalisation itself keeps, to the same bits: of a convolution, batch
    normalisation and ReLU one activation stays in memory, not two, for one pass over it more. So it is with what
    `recomputable` makes of such results. It holds for all threads of the process: those of several must not overlap.
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
    function: Callable[..., Tensor],  # gives the result again
    *inputs: Tensor,  # that the graph keeps anyway
) -> None:
    if _results is not None and result.requires_grad:
        packed = [_pack(x) for x in inputs]
        _results[result.data_ptr()] = _Result(
            weakref.ref(result), result._version, lambda: function(*map(_unpack, packed))
        )


def recomputable(
    function: Callable[..., Tensor],  # a quick one, without randomness
    *inputs: Tensor,
) -> Tensor:
    """function(*inputs); inside of `recomputed_results` it is not kept either, where all inputs are computed again anyway.

    On a GPU, which runs out of time rather than memory, it is kept.
    """
    result = function(*inputs)
    if result.device.type == "cpu" and all(_recomputation(x) is not None for x in inputs):
        # The backward pass is outside of what autocast the forward pass has.
        autocast = torch.autocast("cpu", torch.get_autocast_dtype("cpu"), torch.is_autocast_enabled("cpu"))
        offer_recomputation(result, autocast(function), *inputs)
    return result


def _recomputation(kept: Tensor) -> Callable[[], Tensor] | None:
    found = _results.get(kept.data_ptr()) if _results else None
    result = None if found is None else found.tensor()
    if found is None or result is None:
        return None
    # Another tensor may by now have the address of a result that is gone, or be a part of it, or it has changed.
    layouts = [(x.data_ptr(), x.dtype, x.shape, x.stride()) for x in (kept, result)]
    return found.compute if layouts[0] == layouts[1] and kept._version == found.version else None


def _pack(kept: Tensor) -> Callable[[], Tensor]:
    """How a gradient gets the tensor that it needs."""
    return _recomputation(kept) or _SavedTensor(kept, kept._version)


def _unpack(packed: Callable[[], Tensor]) -> Tensor:
    return packed()
