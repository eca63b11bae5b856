"""Steps per second of training on the device at hand, and where the time goes: python benchmarks/training_profile.py [WORKLOAD ...] [--results FILE]

The images are noise of the size of the workload's, drawn, cropped and turned as in training. On a GPU each precision is
measured with and without a CUDA graph of the step, on the CPU without. Shares are those of the time in which the device
computes, by the operation that launched it, of steps without a graph.
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from memory import keep_heap
from results_file import write_results

from semiseg.config import Config, load_config
from semiseg.data import Augmentation, Case, TrainingSampler, TrainingTensors
from semiseg.engine.determinism import deterministic_algorithms
from semiseg.engine.distributed import Processes
from semiseg.engine.trainer import build_method, build_optimiser, choose_device
from semiseg.engine.training_step import TrainingStep
from semiseg.methods import METHODS
from semiseg.methods.method import Batch

WORKLOADS = {  # a configuration whose last stage is measured, what differs from it, classes, and an image's size
    "la_mper": ((), ("background", "left atrium"), (180, 140, 88)),
    "la_vclipseg": (("method.text=random",), ("background", "left atrium"), (180, 140, 88)),
    "acdc_mper": ((), ("background", "right ventricle", "myocardium", "left ventricle"), (216, 256)),
}
CASES = 8  # labelled, and as many unlabelled
PRECISIONS = ("float32", "bfloat16")
STEPS = {"cuda": 100, "cpu": 3}  # measured, after as many for warming up
PROFILED = {"cuda": 5, "cpu": 2}


def group_of(operation: str) -> str:
    """Under which name the time of an operation of PyTorch or of this library is counted."""
    namespace, _, name = operation.partition("::")
    if namespace == "semiseg_kernels":
        return name.rpartition("_")[0]
    if "conv" in name:
        return "convolutions"
    return "optimiser and moving averages" if "foreach" in name or "fused_sgd" in name else "everything else"


def make_step(
    config: Config, workload: str, device: torch.device
) -> Callable[[int], dict[str, torch.Tensor]]:
    """The whole of an iteration, its batch included."""
    _, class_names, shape = WORKLOADS[workload]
    torch.manual_seed(config.seed)
    text = METHODS[config.method.name].text(config, class_names)
    method = build_method(config, len(class_names), device, text)
    stage = method.stages(torch.Generator().manual_seed(config.seed))[-1]
    if method.prototypes is not None:
        method.prototypes.normal_()
    method.network.train()
    random = np.random.default_rng(config.seed)
    cases = [
        Case(
            str(number),
            random.standard_normal((1, *shape), dtype=np.float32),
            random.integers(0, len(class_names), shape, dtype=np.uint8),
            None,
        )
        for number in range(2 * CASES)
    ]
    training = config.training
    sampler = TrainingSampler(
        TrainingTensors(cases[:CASES], cases[CASES:], device),
        Augmentation(config.dataset.augmentation, training.patch_size),
        training.labelled_batch,
        training.unlabelled_batch,
        seed=config.seed,
    )
    step = TrainingStep(config, method, stage, build_optimiser(config, method), device, Processes())
    return lambda iteration: step(Batch(*sampler.next()), iteration)


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def steps_per_second(step: Callable[[int], Any], device: torch.device) -> float:
    count = STEPS[device.type]
    for iteration in range(count):
        step(iteration)
    wait(device)
    started = time.perf_counter()
    for iteration in range(count):
        step(count + iteration)
    wait(device)
    return count / (time.perf_counter() - started)


def shares(step: Callable[[int], Any], device: torch.device) -> dict[str, float]:
    """Of the time in which the device computes, by group of operations."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profile:
        for iteration in range(PROFILED[device.type]):
            step(iteration)
        wait(device)
    spent: dict[str, float] = defaultdict(float)
    for event in profile.key_averages():
        if event.device_type != torch.autograd.DeviceType.CPU:
            continue  # a kernel, whose time is that of the operation which launched it
        time_total = event.self_device_time_total if device.type == "cuda" else event.self_cpu_time_total
        spent[group_of(event.key)] += time_total
    total = sum(spent.values())
    return {group: part / total for group, part in sorted(spent.items(), key=lambda item: -item[1]) if part}


def measure(workload: str, device: torch.device) -> list[dict[str, Any]]:
    rows = []
    for precision in PRECISIONS:
        for cuda_graph in (False, True) if device.type == "cuda" else (False,):
            overrides = [
                *WORKLOADS[workload][0],
                f"training.precision={precision}",
                f"training.cuda_graph={str(cuda_graph).lower()}",
            ]
            step = make_step(load_config(workload, overrides), workload, device)
            with deterministic_algorithms(False):
                row = {
                    "workload": workload,
                    "precision": precision,
                    "cuda_graph": cuda_graph,
                    "steps_per_second": steps_per_second(step, device),
                    "shares": {} if cuda_graph else shares(step, device),
                }
            print(row, flush=True)
            rows.append(row)
    return rows


if __name__ == "__main__":
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("workloads", nargs="*", default=list(WORKLOADS), help=", ".join(WORKLOADS))
    parser.add_argument("--results", type=Path, metavar="FILE", help="write the rows as JSON")
    options = parser.parse_args()
    for name in options.workloads:
        if name not in WORKLOADS:
            parser.error(f"the workload is {name!r}, accepted are {', '.join(WORKLOADS)}")
    keep_heap()
    device = choose_device("auto")
    rows = [row for name in options.workloads for row in measure(name, device)]
    if options.results:
        write_results(options.results, rows)
