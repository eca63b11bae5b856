"""What stands for CUDA graphs on the CPU: operations recorded while they run, undone, and repeated on the same memory.

As on a GPU, a replay repeats the operations and nothing of the Python around them, so numbers that Python worked out
during the capture stay what they were. What a capture on a GPU cannot contain is refused.
"""

from contextlib import contextmanager, nullcontext

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

# Reading a value, sizes that depend on values, and numbers that come from Python's memory wait for the GPU.
WAITING = (
    "aten::_local_scalar_dense",
    "aten::nonzero",
    "aten::masked_select",
    "aten::_unique2",
    "aten::lift_fresh",
)


def _tensors(values):
    return [value for value in tree_leaves(values) if isinstance(value, torch.Tensor)]


def _memory(tensor):
    return tensor.untyped_storage().data_ptr()


class RecordedGraph(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.operations = []
        self._before = {}  # memory that was there before the capture -> what it held
        self._own = set()  # memory of the capture itself

    def __torch_dispatch__(self, operation, types, arguments=(), keywords=None):
        keywords = keywords or {}
        if operation.name().partition(".")[0] in WAITING:
            raise RuntimeError(f"{operation.name()} in a capture")
        given = _tensors((arguments, keywords))
        for tensor in given:
            if _memory(tensor) not in self._own and _memory(tensor) not in self._before:
                storage = tensor.untyped_storage()
                self._before[_memory(tensor)] = (storage, storage.clone())
        results = operation(*arguments, **keywords)
        known = {_memory(tensor) for tensor in given}
        fresh = [tensor for tensor in _tensors(results) if _memory(tensor) not in known]
        self._own |= {_memory(tensor) for tensor in fresh}
        # Kept without their history, or the graph of autograd would keep what a capture lets go.
        detach = lambda tensor: tensor.detach()
        arguments, keywords = tree_map_only(torch.Tensor, detach, (arguments, keywords))
        self.operations.append((operation, arguments, keywords, [tensor.detach() for tensor in fresh]))
        return results

    def undo(self):
        """A capture computes nothing."""
        for storage, content in self._before.values():
            storage.copy_(content)

    @torch.no_grad()
    def replay(self):
        for operation, arguments, keywords, fresh in self.operations:
            results = operation(*arguments, **keywords)
            known = {_memory(tensor) for tensor in _tensors((arguments, keywords))}
            again = [tensor for tensor in _tensors(results) if _memory(tensor) not in known]
            for tensor, result in zip(fresh, again, strict=True):
                tensor.copy_(result)


@contextmanager
def capture(graph, stream):
    random_state = torch.get_rng_state()
    with graph:
        yield
    graph.undo()
    torch.set_rng_state(random_state)


class NoStream:
    def __init__(self, device=None):
        pass

    def wait_stream(self, other):
        pass


def install(monkeypatch):
    """Let the CPU capture and replay as a GPU does."""
    monkeypatch.setattr(torch.cuda, "CUDAGraph", RecordedGraph)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    monkeypatch.setattr(torch.cuda, "Stream", NoStream)
    monkeypatch.setattr(torch.cuda, "current_stream", NoStream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
