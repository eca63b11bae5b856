"""What can be checked of the GPU benchmarks without a GPU: measurement on the CPU, tables, picture, and the one command."""

import dataclasses
import json
import os
import re
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from matplotlib.image import imread

from semiseg_kernels import available_backends, backends
from semiseg_kernels.backends import OPERATIONS

ROOT = Path(__file__).parents[2]
BENCHMARKS = ROOT / "benchmarks"
GPU_CHECK = BENCHMARKS / "gpu_check.sh"


def host_timer(function):
    start = time.perf_counter()
    result = function()
    return 1e3 * (time.perf_counter() - start), result


def test_without_a_gpu_the_benchmark_skips():
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q", "-rs", "--benchmark-only", "benchmarks/test_gpu_kernels.py"],
        cwd=ROOT, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    (reason,) = [line for line in done.stdout.splitlines() if line.startswith("SKIPPED")]
    assert reason.endswith("no CUDA device")


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("prototype_head", torch.float32),
        ("prototype_similarity", torch.bfloat16),
        ("cluster_mean", torch.bfloat16),
        ("masked_class_mean", torch.bfloat16),
        ("batch_norm_relu", torch.bfloat16),
    ],
)
def test_measurement(module, monkeypatch, name, dtype):
    benchmark, workloads = module("test_gpu_kernels"), module("workloads")
    kernel = "cpu" if "cpu" in available_backends() else "reference"
    monkeypatch.setattr(benchmark, "KERNELS", (kernel,))
    operation = workloads.make_operation(name, workloads.GPU_SIZES["tiny"]["ACDC"], dtype)
    planned = benchmark.plan(name, "ACDC", "tiny") | {"compiled": "not now"}
    contestants, left_out = benchmark.gather(operation, planned)
    assert left_out.pop("max-autotune") and left_out.pop("compiled") == "not now"
    if operation.gemm is None:
        assert left_out == {"gemm": "the operation has no such formulation"}
    else:
        assert left_out == {} and contestants.keys() == {"eager", kernel, "gemm"}
    rows = benchmark.measure(operation, contestants, host_timer, rounds=3)
    parts = ["forward"] if name == "cluster_mean" else ["forward", "backward", "step"]
    assert [row["part"] for row in rows] == parts
    for row in rows:
        assert row["contestants"].keys() == contestants.keys()
        for figures in row["contestants"].values():
            assert 0 < figures["min_us"] <= figures["median_us"]
            expected = row["compulsory_bytes"] / (1e3 * figures["median_us"])
            assert figures["gb_s"] == pytest.approx(expected)
            assert figures["of_copy"] == pytest.approx(expected / row["copy_gb_s"])


def test_contestants_that_fail_or_disagree_are_left_out(module):
    benchmark, workloads = module("test_gpu_kernels"), module("workloads")
    operation = workloads.make_operation("prototype_info_nce", workloads.GPU_SIZES["tiny"]["LA"])
    wrong = dataclasses.replace(operation, gemm=lambda z: (1.1 * operation.gemm(z)[0],))
    planned = {
        "broken": {"backend": "none"},
        "gemm": {"backend": "reference", "is_gemm": True},
        "late": "no time",
    }
    contestants, left_out = benchmark.gather(wrong, planned)
    assert contestants.keys() == {"eager"}
    assert left_out["broken"].startswith("ValueError: the backend is 'none'")
    assert left_out["gemm"].startswith("AssertionError: the kernel differs from the reference by")
    assert left_out["late"] == "no time"


@pytest.mark.parametrize("shape", [(), (2,), (2, 3, 16), (1, 2, 5, 7)])
def test_nan_is_a_difference(module, shape):
    compare = module("contestants").assert_mostly_close
    compare(torch.ones(shape), torch.ones(shape))
    with pytest.raises(AssertionError, match="the kernel differs from the reference"):
        compare(torch.full(shape, torch.nan), torch.ones(shape))


def test_compulsory_traffic(module):
    workloads = module("workloads")
    Traffic = workloads.Traffic

    def traffic(name, dtype=torch.float32):
        operation = workloads.make_operation(name, workloads.Workload(2, (3, 5), 4), dtype)
        return operation.compulsory_traffic(operation.function(operation.x))  # 30 voxels, d = 16, C = 4

    moved = traffic("prototype_similarity", torch.bfloat16)
    assert moved["forward"] == Traffic(30 * 2 * 16, 30 * (2 * 4 + 4))  # z; similarity and index
    assert moved["backward"] == Traffic(30 * (2 * 16 + 2 * 4 + 4), 30 * 2 * 16)  # and the gradient
    moved = traffic("prompt_mix")
    assert moved == {
        "forward": Traffic(30 * 4 * 4, 30 * 4 * 16),
        "backward": Traffic(30 * (4 * 4 + 4 * 16), 30 * 4 * 4),
        "step": Traffic(30 * (2 * 4 * 4 + 4 * 16), 30 * (4 * 16 + 4 * 4)),
    }
    assert moved["step"].total == 30 * 176
    moved = traffic("prototype_head")
    results = 4 * (2 + 2 + 1 + 12 * 16) + 8 * 12
    assert moved["forward"] == Traffic(30 * (4 * 16 + 3), results)
    assert moved["step"].total == 30 * (4 * 16 + 3 + 2 * 4 * 16 + 2) + 2 * results
    moved = traffic("masked_class_mean")
    assert moved["forward"] == Traffic(30 * (4 * 16 + 4 * 4), 4 * 4 * 16)
    assert moved["backward"] == Traffic(30 * 4 * 4 + 4 * 4 * 16, 30 * 4 * 16)
    moved = traffic("batch_norm_relu")
    assert moved["forward"] == Traffic(30 * 2 * 4 * 16, 30 * 4 * 16)
    assert moved["backward"] == Traffic(30 * 4 * 4 * 16, 30 * 4 * 16)


@pytest.mark.parametrize(
    ("name", "shapes"),
    [("linear_classifier", [(4, 16), (4,)]), ("batch_norm_relu", [(16,), (16,)]), ("prompt_mix", [(4, 16)]), ("dice_ce", [])],
)  # fmt: skip
def test_contestants_compute_the_gradients_of_the_parameters_too(module, name, shapes):
    workloads = module("workloads")
    operation = workloads.make_operation(name, workloads.SIZES["tiny"]["2d"])
    contestant = module("contestants").Contestant(operation, "reference")
    gradients = contestant.backward(contestant.forward())
    assert [gradient.shape for gradient in gradients] == [operation.x.shape, *shapes]


@pytest.mark.parametrize(("dtype", "error", "accepted"), [
    (torch.float32, 2e-3, True), (torch.float32, 1e-2, False), (torch.bfloat16, 1e-2, True), (torch.bfloat16, 0.1, False),
])  # fmt: skip
def test_voxels_of_one_value_at_the_border_of_a_relu(module, dtype, error, accepted):
    """They may all go the other way, and the gradients of parameters with them."""
    contestants, workloads = module("contestants"), module("workloads")
    operation = workloads.make_operation("batch_norm_relu", workloads.SIZES["tiny"]["2d"], dtype)
    reference, other = (contestants.Contestant(operation, "reference") for _ in range(2))
    backward = other.backward

    def moved(results):
        of_x, of_weight, of_bias = backward(results)
        return of_x, of_weight, (1 + error) * of_bias

    other.backward = moved
    with nullcontext() if accepted else pytest.raises(AssertionError, match="of its norm"):
        contestants.assert_agreement(other, reference)


def test_logits_of_bfloat16_are_compared_as_what_they_are(module):
    contestants, workloads = module("contestants"), module("workloads")
    operation = workloads.make_operation("linear_classifier", workloads.SIZES["tiny"]["2d"], torch.bfloat16)
    reference, other = (contestants.Contestant(operation, "reference") for _ in range(2))
    forward = other.forward
    other.forward = lambda: tuple(1.01 * result for result in forward())
    with pytest.raises(AssertionError, match="in .* of the values"):
        contestants.assert_agreement(other, reference)


def test_the_sanitizer_watches_every_cuda_kernel(module, monkeypatch):
    select, selected = backends.select, set()

    def recorded(operation, *arguments):
        selected.add(operation)
        return select(operation, *arguments)

    monkeypatch.setattr(backends, "select", recorded)
    module("every_cuda_path").run_everything("cpu", "auto")
    assert selected == OPERATIONS["cuda"] & OPERATIONS["triton"]


def made_up_results():
    def figures(microseconds, share, megabytes):
        return {
            "median_us": microseconds, "min_us": microseconds, "gb_s": 1e3 * share, "of_copy": share,
            "extra_peak_mb": megabytes,
        }  # fmt: skip

    def row(operation, part, dtype):
        return {
            "device": "gpu", "operation": operation, "part": part, "workload": "LA", "dtype": dtype, "batch": 4,
            "spatial": [112, 112, 80], "num_classes": 2, "per_class": 3, "d": 16, "rounds": 31,
            "automatic": "cuda", "compulsory_bytes": 400_000_000, "copy_gb_s": 4000.0, "matmul_tflops": 50.0,
            "contestants": {
                "eager": figures(4000.0, 0.025, 2019), "triton": figures(125.0, 0.8, 257),
                "cuda": figures(110.0, 0.91, 256), "compiled": figures(660.0, 0.15, 700),
                "gemm": None, "max-autotune": None,
            },
            "left_out": {"gemm": "OutOfMemoryError: no", "max-autotune": "no time"},
        }  # fmt: skip

    rows = [
        row(operation, part, dtype)
        for dtype in ("float32", "bfloat16")
        for operation, part in (("prototype_head", "step"), ("cluster_mean", "forward"), ("dice_ce", "step"))
    ]
    where = {
        "cpu": "a cpu", "cores": 16, "threads": 16, "versions": {"torch": "2.11"}, "commit": "abc",
        "gpu": {"name": "a GPU", "count": 1, "versions": {"driver": "580", "cuda": "13.0", "triton": "3.6"}},
    }  # fmt: skip
    return {"environment": where, "command": "pytest benchmarks", "rows": rows}


def test_table(module):
    table = module("gpu_tables").gpu_table(made_up_results())
    lines = table.splitlines()
    assert lines[0] == "LA: B = 4, 112×112×80 voxels, d = 16, C = 2, K = 3, float32"
    assert sum(line.startswith("LA: ") for line in lines) == 2
    cells = [cell.strip() for cell in lines[4].strip("|").split("|")]
    assert cells == [
        "prototype_head step", "cuda", "100", "125", "110", "4000", "660", "–", "–", "80", "91", "36.4", "6.0",
        "256", "2019",
    ]  # fmt: skip
    assert "gemm: OutOfMemoryError: no; max-autotune: no time" in lines[-1]
    assert (
        "a GPU; torch 2.11, driver 580, cuda 13.0, triton 3.6; commit abc; `pytest benchmarks`" in lines[-1]
    )


def test_table_where_the_automatic_choice_failed(module):
    results = made_up_results()
    results["rows"][0]["contestants"]["cuda"] = None
    cells = [
        cell.strip() for cell in module("gpu_tables").gpu_table(results).splitlines()[4].strip("|").split("|")
    ]
    assert cells[1:5] == ["cuda", "100", "125", "–"] and cells[-5:] == ["–", "–", "–", "–", "2019"]


def test_summary_says_of_what_it_is(module):
    results = made_up_results() | {"note": "dice_ce is of abd."}
    for row in results["rows"]:
        row["part"] = "forward"
    results["rows"][0]["contestants"]["cuda"] = None
    lines = module("gpu_tables").gpu_summary_table(results).splitlines()
    cells = [cell.strip() for cell in lines[2].strip("|").split("|")]
    assert cells == ["prototype_head forward", "–", "–", "–", "110", "91 %", "36.4×"]
    assert lines[-1].endswith("a GPU; commit abc. dice_ce is of abd.")


def test_operations_of_the_roofline(module):
    row = made_up_results()["rows"][0]
    voxels, scores = 4 * 112 * 112 * 80, 2 * 16 * 6
    operations = module("roofline").operations
    assert operations(row) == voxels * (3 * scores + 2 * 16)
    assert operations(row | {"part": "backward"}) == voxels * 2 * scores
    of_classes = row | {"operation": "linear_classifier"}
    assert operations(of_classes) == voxels * 3 * 2 * 16 * 2
    assert operations(of_classes | {"part": "forward"}) == voxels * 2 * 16 * 2
    assert operations(row | {"operation": "dice_ce"}) is None


def test_picture(module, tmp_path):
    results = made_up_results()
    module("roofline").roofline(results, tmp_path / "both.png")
    results["rows"] = results["rows"][:1]
    module("roofline").roofline(results, tmp_path / "one.png")
    both, one = imread(tmp_path / "both.png"), imread(tmp_path / "one.png")
    assert both.shape[1] == 2 * one.shape[1] and both[..., :3].std() > 0


def gpu_check(out, python, **environment):
    return subprocess.run(
        ["bash", GPU_CHECK, out / "wheels"],
        env=os.environ | {"PYTHON": str(python), "OUT": str(out)} | environment,
        capture_output=True, text=True, check=False,
    )  # fmt: skip


def fake_python(folder, status):
    python = folder / "python"
    python.write_text(f'#!/bin/sh\necho "$@" >>{folder}/calls\nexit {status}\n')
    python.chmod(0o755)
    return python


@pytest.mark.skipif("triton" not in available_backends(), reason="no Triton, or nothing to run it")
def test_triton_kernels_are_compiled_for_every_workload(module, monkeypatch):
    compilation, workloads = module("compile_triton"), module("workloads")
    made = []
    make = workloads.make_operation
    monkeypatch.setattr(
        compilation, "make_operation", lambda name, *shape: made.append(name) or make(name, *shape)
    )
    compilation.compile_kernels("dice_ce", torch.float32, "tiny", "cpu")
    assert made == ["dice_ce"] * len(workloads.GPU_SIZES["full"])


def test_gpu_check_parses():
    subprocess.run(["bash", "-n", GPU_CHECK], check=True)


def test_gpu_check_goes_on_after_a_failing_step(tmp_path):
    done = gpu_check(tmp_path / "out", fake_python(tmp_path, status=3))
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert done.returncode == 1 and summary["failed"]
    names = ["machine", "wheels", "build", "tests", "benchmarks", "roofline", "sanitizer"]
    assert list(summary["steps"]) == names
    assert all(step["exit_status"] != 0 and step["seconds"] >= 0 for step in summary["steps"].values())
    assert summary["steps"]["benchmarks"]["exit_status"] == 3
    assert "tests/kernels/test_gpu.py" in (tmp_path / "calls").read_text()


def test_gpu_check_succeeds_if_all_steps_do(tmp_path):
    steps = "wheels build tests benchmarks roofline"
    done = gpu_check(tmp_path / "out", fake_python(tmp_path, status=0), STEPS=steps)
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert done.returncode == 0, done.stdout + done.stderr
    assert not summary["failed"] and list(summary["steps"]) == steps.split()
    calls = (tmp_path / "calls").read_text()
    assert "setup.py egg_info build_ext --inplace" in calls
    assert "benchmarks/test_gpu_kernels.py --benchmark-only" in calls and "benchmarks/roofline.py" in calls


def test_gpu_check_runs_every_test_of_a_gpu_once(tmp_path):
    gpu_check(tmp_path / "out", fake_python(tmp_path, status=0), STEPS="tests")
    calls = [
        re.search(r"(tests/\w+/test_\w+\.py) -k (.+)$", line).groups()
        for line in (tmp_path / "calls").read_text().splitlines()
    ]
    every = {file for file, _ in calls}
    tests = [path for path in (ROOT / "tests").glob("*/test_*.py") if path != Path(__file__)]
    marks = re.compile(r"mark\.gpu|pytestmark = .*\"cuda\"")
    for_a_gpu = {str(path.relative_to(ROOT)) for path in tests if marks.search(path.read_text())}
    on_both = {f"tests/kernels/test_{name}.py" for name in OPERATIONS["cuda"] & OPERATIONS["triton"]}
    assert for_a_gpu and on_both and for_a_gpu | on_both <= every
    assert all((ROOT / file).is_file() for file in every)
    ids = [f"test_accuracy[{case}]" for case in ("3d-dtype0-contiguous-{}", "2d-dtype2-channels_last-{}")]
    ids += [
        "test_nan[{}]",
        "test_label_dtypes[{}-dtype2]",
        "test_accuracy_of_options[contiguous-options0-{}]",
    ]
    for file in {file for file, expression in calls if "triton" in expression}:
        for test in (name.format(kernel) for kernel in ("triton", "cuda") for name in ids):
            selected = [
                expression
                for called, expression in calls
                if called == file
                and eval(re.sub(r"(?!and|or|not)\b\w+", r"('\g<0>' in test)", expression), {"test": test})
            ]
            assert len(selected) == 1, (file, test, selected)
