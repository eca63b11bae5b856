"""The C++ kernels against the reference in plain PyTorch and under torch.compile, on inputs as in training.

All contestants run in one process, in turns (A B C A B C ...), with the same allocator settings.
"""

import dataclasses
from typing import Any

import pytest
from contestants import Contestant, assert_agreement, seconds_of, summarise, traffic
from pytest_benchmark.fixture import BenchmarkFixture
from workloads import OPERATIONS, SIZES, make_operation

from semiseg_kernels import available_backends, backends

ROUNDS = 7


@pytest.mark.parametrize("name", [name for name in OPERATIONS if name in backends.OPERATIONS["cpu"]])
@pytest.mark.parametrize("workload", SIZES["full"])
def test_operation(
    benchmark: BenchmarkFixture,
    name: str,
    workload: str,
    size: str,
    allocator: str,
    record: list[dict[str, Any]],
) -> None:
    if "cpu" not in available_backends():
        pytest.skip("backend 'cpu' is not available here")
    shape = SIZES[size][workload]
    operation = make_operation(name, shape)
    contestants = {
        "cpu": Contestant(operation, "cpu"),
        "eager": Contestant(operation, "reference"),
        "compiled": Contestant(operation, "reference", "inductor" if size == "full" else "aot_eager"),
    }
    assert_agreement(contestants["cpu"], contestants["eager"])
    assert_agreement(contestants["compiled"], contestants["eager"])
    plain = traffic(operation.x)
    traffic_seconds: dict[str, list[float]] = {kind: [] for kind in plain}

    def others() -> None:
        """The turns of the others, before each round of the kernel."""
        for kind, access in plain.items():
            traffic_seconds[kind].append(seconds_of(access))
        contestants["eager"].step()
        contestants["compiled"].step()

    others()
    contestants["cpu"].step()
    for contestant in contestants.values():
        contestant.discard_times()
    for seconds in traffic_seconds.values():
        seconds.clear()
    benchmark.pedantic(contestants["cpu"].step, setup=others, rounds=ROUNDS)

    for row in summarise(contestants, traffic_seconds):
        where = {"device": "cpu", "allocator": allocator}
        record.append({"operation": name, **dataclasses.asdict(shape), **where, **row})
        benchmark.extra_info[row["part"]] = row
