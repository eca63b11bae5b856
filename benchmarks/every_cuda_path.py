"""Every operation of the CUDA backend on small inputs of every kind, as something for compute-sanitizer to watch."""

import dataclasses
import itertools

import torch
from contestants import Contestant
from torch import Tensor
from workloads import OPERATIONS, Workload, make_operation

from semiseg_kernels import backends, largest_components, momentum_update_, use_backend

WORKLOADS = (
    Workload(2, (3, 5, 11), 2),
    Workload(2, (8, 16), 4),
    Workload(1, (1, 37), 3, per_class=5, d=17),
    Workload(1, (6, 11), 14, per_class=8, d=64),
    Workload(1, (5, 7), 16, per_class=16, d=512),
    Workload(1, (5, 27), 7, d=24),
    Workload(1, (5, 7), 20, d=33),
)


def channels_last(x: Tensor) -> Tensor:
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


def run_everything(device: str, backend: str) -> None:
    operations = [name for name in OPERATIONS if name in backends.OPERATIONS["cuda"]]
    for workload, dtype, name in itertools.product(WORKLOADS, (torch.float32, torch.bfloat16), operations):
        contiguous = make_operation(name, workload, dtype, device)
        for operation in (contiguous, dataclasses.replace(contiguous, x=channels_last(contiguous.x))):
            Contestant(operation, backend).forward_and_backward()
        if name == "prompt_mix":  # whose upstream gradient is the large input
            contestant = Contestant(contiguous, backend)
            contestant.cotangents = [channels_last(x) for x in contestant.cotangents]
            contestant.forward_and_backward()
    with torch.device(device), use_backend(backend):
        count = torch.arange(12).view(4, 3).double()
        momentum_update_(torch.randn(4, 3, 16), torch.randn(4, 3, 16), count, 0.999)
        for workload in WORKLOADS:
            classes = workload.num_classes
            label = torch.randint(0, classes, (workload.batch, *workload.spatial), dtype=torch.uint8)
            largest_components(label, classes)


if __name__ == "__main__":
    run_everything("cuda", "cuda")
    torch.cuda.synchronize()
