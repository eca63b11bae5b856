"""The emulator that runs CUDA kernels on the CPU: it computes what a GPU would, and detects what a GPU forgives."""

import ctypes
import shutil
import subprocess
from pathlib import Path
from typing import Any

import emulation
import pytest
import torch
from test_determinism import OPERATIONS, everything

from semiseg_kernels import use_backend

EXAMPLES = emulation.EMULATOR / "examples.cu"
ORDERS = ("forward", "reverse", "shuffled")
# In the order of `Misuse` in examples.cu: what the error says.
MISUSES = {
    "none": None,
    "barrier_in_a_branch": r"others that never come: 54 .*: ended; 10 .*: waits at __syncthreads",
    "return_before_a_barrier": r"others that never come: 1 \(thread \(17, 0, 0\)\): ended; 63 .*: waits at __syncthreads",
    "missing_lane": r"others that never come: 33 .*: waits at __syncthreads; 31 .*: waits at a shuffle",
    "foreign_lane": "a shuffle reads lane 20, which takes no part",
    "mixed_collectives": "while other lanes of the warp wait at",
    "beyond_dynamic_shared": "a write beyond the end of dynamic shared memory",
    "misaligned": r"thread \(5, 0, 0\): misaligned access to 0x[0-9a-f]+ at .*examples.cu:\d+",
    "out_of_bounds": r"thread \(63, 0, 0\): index 64 is out of bounds at .*examples.cu:\d+",
}


@pytest.fixture(scope="module")
def examples() -> ctypes.CDLL:
    reason = emulation.missing_tools()
    if reason is not None:
        pytest.skip(reason)
    library = emulation.BUILD / "examples.so"
    emulation.build_library(library, [EXAMPLES])
    return ctypes.CDLL(str(library))


@pytest.fixture(params=ORDERS)
def order(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("SEMISEG_EMULATED_ORDER", request.param)
    return request.param


@pytest.fixture(scope="module")
def emulated_cuda() -> None:
    if torch.cuda.is_available():
        pytest.skip('the backend "cuda" runs on the GPU here')
    reason = emulation.missing_tools()
    if reason is not None:
        pytest.skip(reason)
    emulation.emulated_cuda_module()


def run(function: Any, *arguments: torch.Tensor | int | bool) -> None:
    """Call an example; raises RuntimeError with the error it returns."""
    function.restype = ctypes.c_char_p
    error = function(
        *(ctypes.c_void_p(x.data_ptr()) if torch.is_tensor(x) else ctypes.c_int64(x) for x in arguments)
    )
    if error is not None:
        raise RuntimeError(error.decode())


def test_sum_through_shuffles_and_shared_memory(examples: ctypes.CDLL, order: str) -> None:
    x = torch.randn(10_007)
    partials, result = torch.full((5,), torch.nan, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    run(examples.sum, x, len(x), 5, 256, partials, result)
    torch.testing.assert_close(result.item(), x.double().sum().item(), rtol=0, atol=1e-3)
    torch.testing.assert_close(partials.sum(), result[0])
    assert partials.unique().numel() == 5


def test_vector_loads(examples: ctypes.CDLL) -> None:
    x = torch.randn(1000, 4)
    copy = torch.full_like(x, torch.nan)
    run(examples.copy, x, copy, len(x))
    assert torch.equal(copy, x)


def test_asynchronous_copies_are_done_when_waited_for(examples: ctypes.CDLL, order: str) -> None:
    x = torch.randn(2, 64)
    seen = torch.full((3, 64), torch.nan)
    run(examples.asynchronous_copies, x, seen, 3)
    before = x[1:] if order == "reverse" else torch.full((1, 64), -1.0)  # there they are done at once too
    assert torch.equal(seen, torch.cat([before, x]))


def test_collectives(examples: ctypes.CDLL, order: str) -> None:
    threads = 64
    results = torch.full((11, threads), -1, dtype=torch.int32)
    run(examples.collectives, results, threads)
    expected = []
    for i in range(threads):
        lane, warp = i % 32, i - i % 32
        expected.append(
            [
                warp + 5,
                i - i % 8 + 1,
                i ^ 3,
                i - 2 if lane >= 2 else i,
                i + 2 if lane % 16 < 14 else i,
                sum(1 << lane for lane in range(31) if lane % 3 == 0),
                1 if warp else 2,
                sum(range(warp, warp + 32)),
                13,
                1,
                1,
            ]
        )
    assert torch.equal(results, torch.tensor(expected, dtype=torch.int32).T)


def test_collectives_of_half_a_warp(examples: ctypes.CDLL, order: str) -> None:
    results = torch.full((64,), -1, dtype=torch.int32)
    run(examples.halves, results, 64)
    assert results.view(2, 2, 16).unique(dim=2).tolist() == [[[120], [376]]] * 2


def test_rounding_to_16_bits(examples: ctypes.CDLL) -> None:
    upper = torch.arange(1 << 16, dtype=torch.int32) << 16
    # Every exponent and sign with mantissas just below, at and above ties of both types.
    mantissas = torch.tensor([0, 1, 0x0FFF, 0x1000, 0x1001, 0x2FFF, 0x3000, 0x7FFF, 0x8000, 0x8001, 0xFFFF])
    x = (upper[:, None] | mantissas.int()).view(torch.float32).flatten()
    bfloat16, float16 = torch.empty_like(x, dtype=torch.bfloat16), torch.empty_like(x, dtype=torch.float16)
    run(examples.round_to_16_bits, x, bfloat16, float16, len(x))
    for rounded in (bfloat16, float16):
        expected = x.to(rounded.dtype)
        assert torch.equal(rounded.isnan(), x.isnan())
        assert torch.equal(rounded[~x.isnan()].view(torch.int16), expected[~x.isnan()].view(torch.int16))


def test_widening_from_16_bits(examples: ctypes.CDLL) -> None:
    patterns = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int16)
    given = patterns.view(torch.bfloat16), patterns.view(torch.float16)
    widened = torch.zeros(2, len(patterns))
    run(examples.widen, *given, *widened, len(patterns))
    for values, result in zip(given, widened, strict=True):
        expected = values.float()
        assert torch.equal(result.isnan(), expected.isnan())
        assert torch.equal(
            result[~result.isnan()].view(torch.int32), expected[~result.isnan()].view(torch.int32)
        )


def test_barrier_makes_the_order_irrelevant(examples: ctypes.CDLL, order: str) -> None:
    x = torch.randn(96)
    reversed_x = x.clone()
    run(examples.reverse, reversed_x, len(x), True)
    assert torch.equal(reversed_x, x.flip(0))


def test_missing_barrier_shows(examples: ctypes.CDLL, order: str) -> None:
    x = torch.randn(96)
    reversed_x = x.clone()
    run(examples.reverse, reversed_x, len(x), False)
    right = reversed_x == x.flip(0)
    assert reversed_x[~right].isnan().all()
    # Of two threads that exchange their values, only the later one finds the other's.
    assert right.sum() == 48
    assert {"forward": right[48:].all(), "reverse": right[:48].all()}.get(
        order, right[:48].any() and right[48:].any()
    )


def test_shared_memory_starts_as_nan(examples: ctypes.CDLL) -> None:
    contents = torch.zeros(3, 2, 64)
    run(examples.shared_contents, contents, 3)
    assert contents.isnan().all()


def test_order_of_blocks(examples: ctypes.CDLL, order: str) -> None:
    counter, blocks = torch.zeros(1, dtype=torch.int32), torch.full((12,), -1, dtype=torch.int32)
    run(examples.block_order, counter, blocks, 4, 3)
    forward = list(range(12))
    assert sorted(blocks.tolist()) == forward
    assert (blocks.tolist() == forward) == (order == "forward")
    assert (blocks.tolist() == forward[::-1]) == (order == "reverse")


@pytest.mark.parametrize("misuse", MISUSES)
def test_misuse_is_detected(examples: ctypes.CDLL, misuse: str, order: str) -> None:
    number = list(MISUSES).index(misuse)
    if MISUSES[misuse] is None:
        run(examples.misuse, number, torch.randn(64))
    else:
        with pytest.raises(RuntimeError, match=rf"misuse_kernel.*: block \(1, 0, 0\): .*{MISUSES[misuse]}"):
            run(examples.misuse, number, torch.randn(64))
        run(examples.misuse, 0, torch.randn(64))  # and the next launch is not affected


def test_launches_that_a_gpu_refuses(examples: ctypes.CDLL) -> None:
    x = torch.randn(1024)
    run(examples.launch_with, x, 1024, 100 * 1024)
    with pytest.raises(RuntimeError, match=r"reverse_kernel<true>.*: invalid configuration"):
        run(examples.launch_with, x, 1025, 0)
    with pytest.raises(RuntimeError, match=r"reverse_kernel<true>.*: invalid argument"):
        run(examples.launch_with, x, 1024, 228 * 1024)


@pytest.mark.parametrize(
    ("statement", "accepted"),
    [
        ("atomicAdd(counter, 1)", True),
        ("atomicAdd(sum, 1.0f)", False),
        ("sum[0] = float(x) + float(x)", True),
        ("sum[0] = x + x", False),
    ],
)
def test_refuses_what_kernels_here_must_not_use(
    examples: ctypes.CDLL, statement: str, accepted: bool
) -> None:
    source = f"""
        #include <cuda_bf16.h>
        __global__ void kernel(int* counter, float* sum, __nv_bfloat16 x) {{ {statement}; }}
    """
    assert emulation.compiles(source) == accepted


def test_examples_are_cuda(tmp_path: Path) -> None:
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("no nvcc")
    command = [nvcc, "-std=c++17", "-arch=sm_90", "--cubin", f"-I{emulation.ROOT / 'csrc'}", str(EXAMPLES)]
    cubin = tmp_path / "examples.cubin"
    command += ["-o", str(cubin)]
    environment = emulation.TOOL_ENVIRONMENT
    result = subprocess.run(command, check=False, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    assert cubin.stat().st_size > 0


# Without a GPU this stands for compute-sanitizer's racecheck.
@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize(("classes", "per_class", "width", "voxels"), [(2, 3, 16, 2300), (5, 7, 37, 700)])
def test_kernels_do_not_depend_on_the_order_of_threads(
    emulated_cuda: None,
    monkeypatch: pytest.MonkeyPatch,
    operation: str,
    classes: int,
    per_class: int,
    width: int,
    voxels: int,
) -> None:
    inputs = (
        torch.randn(2, width, voxels),
        torch.randn(classes, per_class, width),
        torch.randint(-1, classes, (2, voxels), dtype=torch.int8),
        torch.randint(0, 2, (2, voxels), dtype=torch.uint8),
        torch.rand(2, voxels),
    )
    results = []
    for order in ORDERS:
        monkeypatch.setenv("SEMISEG_EMULATED_ORDER", order)
        with use_backend("cuda"):
            results.append(everything(operation, inputs))
    assert not any(result.isnan().any() for result in results[0])
    for other in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0], other, strict=True))
