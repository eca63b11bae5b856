"""The C++ kernels against the reference in plain PyTorch and under torch.compile, on inputs as in training.

All contestants run in one process, in turns (A B C A B C ...), with the same allocator settings.
"""

import dataclasses
from typing import Any

import pytest
import torch
from contestants import Contestant, assert_agreement, plain_accesses, seconds_of, summarise
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
    embeddings = torch.ones(shape.batch, shape.d, *shape.spatial)  # logits alone could lie in a cache
    accesses = plain_accesses(embeddings)
    seconds_per_byte: dict[str, list[float]] = {kind: [] for kind in accesses}

    def others() -> None:
        """The turns of the others, before each round of the kernel."""
        for kind, access in accesses.items():
            seconds_per_byte[kind].append(seconds_of(access) / embeddings.nbytes)
        contestants["eager"].step()
        contestants["compiled"].step()

    others()
    contestants["cpu"].step()
    for contestant in contestants.values():
        contestant.discard_times()
    for seconds in seconds_per_byte.values():
        seconds.clear()
    benchmark.pedantic(contestants["cpu"].step, setup=others, rounds=ROUNDS)

    traffic = operation.compulsory_traffic(contestants["eager"].forward())
    for row in summarise(contestants, traffic, seconds_per_byte):
        where = {"device": "cpu", "allocator": allocator}
        record.append({"operation": name, **dataclasses.asdict(shape), **where, **row})
        benchmark.extra_info[row["part"]] = row
