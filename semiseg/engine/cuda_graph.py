"""The work of a function on the GPU, recorded once and replayed: the processor no longer launches every kernel."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping

import torch
from torch import Tensor

# Calls in which cuDNN chooses its algorithms, and libraries and the optimiser allocate what they keep.
WARM_UP = 3

Function = Callable[[Mapping[str, Tensor]], dict[str, Tensor]]


class CudaGraph:
    """A function from tensors to tensors as a CUDA graph, with the same operations on the same memory in every call.

    The first calls run as they are. The next is captured, and from then on what is given is copied into the tensors of
    the capture and the graph replayed. Whatever the function moves in place (parameters, buffers, states of the
    optimiser, PyTorch's random numbers) moves in every call. The function must not wait for the GPU, choose by what is
    in a tensor, or make a tensor of numbers on the processor; PyTorch raises a RuntimeError where it does.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._calls = 0
        self._graph: torch.cuda.CUDAGraph | None = None
        self._given: dict[str, Tensor] = {}
        self._results: dict[str, Tensor] = {}
        self._constants: Hashable = None

    def __call__(
        self,
        function: Function,  # the same in every call; not kept, as its object may hold this graph, and its memory
        given: Mapping[str, Tensor],  # of the same names, shapes and dtypes in every call
        constants: Hashable,  # what else the function goes by; another value is captured anew
    ) -> dict[str, Tensor]:
        """What the function returns, as new tensors."""
        self._calls += 1
        if self._calls <= WARM_UP:
            return self._run_aside(function, given)
        if self._graph is None or constants != self._constants:
            self._capture(function, given)
            self._constants = constants
        for name, tensor in given.items():
            self._given[name].copy_(tensor)
        assert self._graph is not None
        self._graph.replay()
        return {name: result.clone() for name, result in self._results.items()}

    def _run_aside(self, function: Function, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
        # Capture uses a stream of its own, which gradients must have been accumulated on before.
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            results = function(given)
        current.wait_stream(self._stream)
        return results

    def _capture(self, function: Function, given: Mapping[str, Tensor]) -> None:
        self._graph, self._results = None, {}  # the memory of an older graph
        self._given = {name: tensor.clone() for name, tensor in given.items()}
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self._stream):
            self._results = function(self._given)
        self._graph = graph
