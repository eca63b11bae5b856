"""The Triton and CUDA kernels against the reference, compiled and not, and the matrix product, on a GPU's own clock.

All contestants run in one process, in turns (A B C A B C ...). One that fails, disagrees with the reference, or whose
compilation there is no time for, has no figures but the reason.
"""

import dataclasses
import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from contestants import MEGABYTE, Contestant, assert_agreement
from device_timer import DeviceTimer, matmul_tflops
from pytest_benchmark.fixture import BenchmarkFixture
from workloads import GPU_SIZES, OPERATIONS, Operation, make_operation

from semiseg_kernels import backends, use_backend
from semiseg_kernels.backends import select

ROUNDS = 15
KERNELS = ("triton", "cuda")
COMPILATION_SECONDS = 60  # for all compiled contestants together; the first ones get them
# Compiled at every size, and so measured first: of the compiled contestants, it is the one that matters most.
MAIN_OPERATION = "prototype_head"
MAIN_SIZE = "LA"

Timer = Callable[[Callable[[], Any]], tuple[float, Any]]  # milliseconds of a call, and its result

compilation_seconds = 0.0


def _main_first(name: str) -> tuple[bool, str]:
    return name != MAIN_OPERATION, name


@functools.cache
def device_timer() -> DeviceTimer:
    return DeviceTimer()


@functools.cache
def peak_tflops(dtype: torch.dtype) -> float:
    return matmul_tflops(device_timer(), dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("workload", GPU_SIZES["full"])
@pytest.mark.parametrize("name", sorted(set(OPERATIONS) & backends.OPERATIONS["cuda"], key=_main_first))
def test_operation(
    benchmark: BenchmarkFixture,
    name: str,
    dtype: torch.dtype,
    workload: str,
    size: str,
    record: list[dict[str, Any]],
) -> None:
    shape = GPU_SIZES[size][workload]
    operation = make_operation(name, shape, dtype, "cuda")
    contestants, left_out = gather(operation, plan(name, workload, size))
    rows = benchmark.pedantic(
        lambda: measure(operation, contestants, device_timer(), ROUNDS if size == "full" else 2), rounds=1
    )
    per_class = (
        shape.per_class if name.startswith("prototype") or name == "cluster_mean" else 1
    )
    with use_backend("auto"):
        automatic = select(name, operation.x, shape.num_classes, per_class, shape.d)
    for row in rows:
        record.append(
            {
                "device": "gpu",
                "operation": name,
                "workload": workload,
                "dtype": str(dtype).removeprefix("torch."),
                **dataclasses.asdict(shape),
                "automatic": automatic,
                "matmul_tflops": peak_tflops(dtype),
                **row,
                "contestants": row["contestants"] | dict.fromkeys(left_out),
                "left_out": left_out,
            }
        )
    failed = {kernel: left_out[kernel] for kernel in KERNELS if kernel in left_out}
    assert not failed, failed


def plan(name: str, workload: str, size: str) -> dict[str, dict[str, Any] | str]:
    """How to make each contestant beside the reference, or why it is left out."""
    contestants: dict[str, dict[str, Any] | str] = {kernel: {"backend": kernel} for kernel in KERNELS}
    contestants["gemm"] = {"backend": "reference", "is_gemm": True}
    compiled = {"backend": "reference", "compiler": "inductor" if size == "full" else "aot_eager"}
    if MAIN_OPERATION == name or MAIN_SIZE == workload:
        contestants["compiled"] = compiled
    else:
        contestants["compiled"] = f"beyond {MAIN_SIZE} only {MAIN_OPERATION} is compiled"
    if MAIN_OPERATION == name and MAIN_SIZE == workload and size == "full":
        contestants["max-autotune"] = {**compiled, "mode": "max-autotune-no-cudagraphs"}
    else:
        contestants["max-autotune"] = f"only {MAIN_OPERATION} at {MAIN_SIZE} is tuned"
    return contestants


def gather(
    operation: Operation, planned: dict[str, dict[str, Any] | str]
) -> tuple[dict[str, Contestant], dict[str, str]]:
    """The contestants that agree with the reference, itself first, and why the others do not take part."""
    global compilation_seconds
    torch._dynamo.reset()  # it compiles one function for eight shapes at most
    reference = Contestant(operation, "reference")
    contestants, left_out = {"eager": reference}, {}
    for name, how in planned.items():
        if isinstance(how, str):
            left_out[name] = how
            continue
        options = dict(how)
        if options.pop("is_gemm", False):
            if operation.gemm is None:
                left_out[name] = "the operation has no such formulation"
                continue
            options["gemm"] = operation.gemm
        is_compiled = options.get("compiler") is not None
        if is_compiled and compilation_seconds > COMPILATION_SECONDS:
            left_out[name] = f"the {COMPILATION_SECONDS} s for compilation were spent"
            continue
        start = time.perf_counter()
        try:
            contestant = Contestant(operation, **options)
            assert_agreement(contestant, reference)
            contestants[name] = contestant
        except Exception as error:  # noqa: BLE001  whatever it is, the others are measured all the same
            left_out[name] = f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"
        if is_compiled:
            compilation_seconds += time.perf_counter() - start
    return contestants, left_out


def measure(
    operation: Operation, contestants: dict[str, Contestant], timer: Timer, rounds: int
) -> list[dict[str, Any]]:
    """A row for each part of the operation, from the medians of contestants that took turns."""
    parts = ("forward", "backward", "step") if operation.differentiable else ("forward",)
    times: dict[str, dict[str, list[float]]] = {name: {part: [] for part in parts} for name in contestants}
    copy, copies = torch.empty_like(operation.x), []
    for i in range(1 + rounds):
        copy_time, _ = timer(lambda: copy.copy_(operation.x))
        turns = {name: time_parts(contestant, timer) for name, contestant in contestants.items()}
        if i > 0:  # the first round warms up
            copies.append(copy_time)
            for name, part in ((name, part) for name in contestants for part in parts):
                times[name][part].append(turns[name][part])
    traffic = operation.compulsory_traffic(contestants["eager"].forward())
    compulsory = {part: moved.total for part, moved in traffic.items()}
    memory = {name: contestant.memory() for name, contestant in contestants.items()}
    copy_gb_s = 2 * operation.x.nbytes / statistics.median(copies) / 1e6
    rows = []
    for part in parts:
        figures = {}
        for name in contestants:
            median = statistics.median(times[name][part])
            gb_s = compulsory[part] / median / 1e6
            figures[name] = {
                "median_us": 1e3 * median,
                "min_us": 1e3 * min(times[name][part]),
                "gb_s": gb_s,
                "of_copy": gb_s / copy_gb_s,
                "extra_peak_mb": memory[name][part] / MEGABYTE,
            }
        row = {"part": part, "rounds": rounds, "compulsory_bytes": compulsory[part], "copy_gb_s": copy_gb_s}
        rows.append({**row, "contestants": figures})
    return rows


def time_parts(contestant: Contestant, timer: Timer) -> dict[str, float]:
    """Milliseconds of forward, of backward, and of both on end."""
    times = {}
    times["forward"], results = timer(contestant.forward)
    times["backward"], _ = timer(functools.partial(contestant.backward, results))
    del results
    times["step"], _ = timer(contestant.forward_and_backward)
    return times
