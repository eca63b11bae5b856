"""Without memory a kernel raises an error, also where it is one of its threads that runs out of it."""

import subprocess
import sys

import pytest

pytest.importorskip("semiseg_kernels._C")

CODE = """
import resource
import torch
from semiseg_kernels import cluster_mean, convolution, use_backend

def run(size):
    with torch.no_grad(), use_backend("cpu"):
        {call}

x = torch.randn(1, 256, 1, 100_000).to(memory_format=torch.channels_last)
weight, prototypes = torch.randn(16, 256, 3, 3), torch.randn(2, 200, 4096)
torch.set_num_threads(2)
run(4)
with open("/proc/self/statm") as file:
    taken = int(file.read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (taken + {spare}, resource.RLIM_INFINITY))
try:
    run(None)
except MemoryError:
    print("MemoryError")
"""
# The first takes as much as x for each thread, beside its result; the second more than its result before there are threads.
CALLS = {
    "of a thread": ("convolution(x[..., :size], weight)", 50 << 20),
    "of all": (
        "cluster_mean(torch.ones(1, 4096, 1), prototypes[:, :size], torch.zeros(1, 1).long())",
        10 << 20,
    ),
}


@pytest.mark.parametrize("call", CALLS)
def test_no_memory(call):
    code, spare = CALLS[call]
    done = subprocess.run(
        [sys.executable, "-c", CODE.format(call=code, spare=spare)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "MemoryError\n"), done.stderr
