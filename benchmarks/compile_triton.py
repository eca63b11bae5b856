"""Compile the Triton kernels that test_gpu_kernels.py measures, into Triton's cache: python benchmarks/compile_triton.py OPERATION DTYPE

gpu_check.sh does so for all operations and dtypes side by side: compilation takes one core, and far longer than measuring.
"""

import sys

import torch
from contestants import Contestant
from workloads import GPU_SIZES, make_operation


def compile_kernels(name: str, dtype: torch.dtype, size: str, device: str) -> None:
    """Run an operation forward and backward on the backend "triton", once for every workload of this size."""
    for workload in GPU_SIZES[size].values():
        Contestant(make_operation(name, workload, dtype, device), "triton").forward_and_backward()


if __name__ == "__main__":
    _, name, dtype = sys.argv
    compile_kernels(name, getattr(torch, dtype), "full", "cuda")
