"""The benchmarks on tiny inputs: that they run, measure what they say, and refuse what is wrong."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from semiseg.config import load_config
from semiseg.data import Augmentation, TrainingSampler
from semiseg.engine import metrics_log
from semiseg.engine.metrics_log import MetricsLog
from semiseg.engine.run_directory import RunDirectory
from semiseg.engine.trainer import build_method
from semiseg.methods.method import Batch
from semiseg_kernels import available_backends

ROOT = Path(__file__).parents[2]
BENCHMARKS = ROOT / "benchmarks"
MEBIBYTE = 1 << 20
PYTEST = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider"]


needs_cpu = pytest.mark.skipif(
    "cpu" not in available_backends(), reason="backend 'cpu' is not available here"
)


@needs_cpu
@pytest.mark.slow
@pytest.mark.parametrize(
    ("allocator", "operations"),
    [("kept", {"cluster_mean": ("forward",)}), ("default", {"prototype_head": ("forward", "backward", "step")})],
)
def test_run_on_tiny_inputs(tmp_path, module, allocator, operations):
    file = tmp_path / "cpu-kernels.json"
    arguments = [
        "benchmarks",
        "--benchmark-only",
        "--size",
        "tiny",
        "--results",
        str(file),
        "--allocator",
        allocator,
    ]
    done = subprocess.run(
        [*PYTEST, *arguments, "-k", f"3d and ({' or '.join(operations)})"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads(file.read_text())
    parts = [(row["operation"], row["part"]) for row in results["rows"]]
    assert parts == [(operation, part) for operation in operations for part in operations[operation]]
    for row in results["rows"]:
        assert row["allocator"] == allocator
        assert row["contestants"].keys() == {"cpu", "eager", "compiled"}
        assert all(contestant["median_ms"] > 0 for contestant in row["contestants"].values())
    assert results["environment"].keys() == {"cpu", "cores", "versions", "commit", "threads"}
    assert "benchmarks --benchmark-only --size tiny" in results["command"]
    table = module("cpu_tables").kernel_table(results)
    assert table in done.stdout and all(f"| {operation} " in table for operation in operations)


def test_plain_test_runs_leave_the_benchmarks_out(pytestconfig):
    assert pytestconfig.getini("testpaths") == ["tests"]


@pytest.mark.parametrize("kept", [False, True])
def test_extra_peak_of_a_known_allocation(kept):
    """Two blocks of 64 MB at once, one of them given back, after 300 MB were freed before."""
    code = f"""
import torch
from memory import host_extra_peak, keep_heap
if {kept}:
    keep_heap()
torch.ones(300 << 18)
def call():
    a = torch.ones(64 << 18)
    b = torch.ones(64 << 18)
    del a
    return b
for _ in range(3):
    print(host_extra_peak(call)[0])
"""
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": str(BENCHMARKS)},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    for measured in map(int, done.stdout.split()):
        assert abs(measured - 128 * MEBIBYTE) < 2 * MEBIBYTE


@pytest.mark.parametrize("kept", [False, True])
def test_a_kept_heap_pays_no_page_faults(kept):
    code = f"""
import torch
from memory import keep_heap, page_faults
if {kept}:
    keep_heap()
faults = []
for _ in range(41):
    before = page_faults()
    torch.ones(64 << 18)
    faults.append(page_faults() - before)
print(sorted(faults)[20])
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": str(BENCHMARKS)}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert (int(done.stdout) == 0) == kept


@needs_cpu
@pytest.mark.parametrize(
    "name",
    [
        "prototype_similarity", "prototype_head", "cluster_mean", "dice_ce", "prompt_mix", "masked_class_mean",
        "batch_norm_relu", "linear_classifier",
    ],
)  # fmt: skip
def test_a_wrong_kernel_is_refused(module, name):
    contestants, workloads = module("contestants"), module("workloads")
    operation = workloads.make_operation(name, workloads.SIZES["tiny"]["2d"])
    reference, kernel = (
        contestants.Contestant(operation, "reference"),
        contestants.Contestant(operation, "cpu"),
    )
    contestants.assert_agreement(kernel, reference)
    forward, backward = kernel.forward, kernel.backward
    kernel.forward = lambda: tuple(1.01 * result for result in forward())
    with pytest.raises(AssertionError):
        contestants.assert_agreement(kernel, reference)
    kernel.forward = forward
    for wrong in range(len(backward(forward()))):
        kernel.backward = lambda results, wrong=wrong: [
            (1.01 if i == wrong else 1) * gradient for i, gradient in enumerate(backward(results))
        ]
        with pytest.raises(AssertionError):
            contestants.assert_agreement(kernel, reference)


def test_tables_of_the_documents_are_up_to_date(module):
    tables = module("tables")
    marked = set()
    for document in tables.DOCUMENTS:
        text = document.read_text()
        assert text == tables.fill(text, tables.read_results()), document.name
        marked |= {name for _, name, _ in tables.MARKED.findall(text)}
    assert marked == set(tables.TABLES)


def test_tables_are_filled_between_their_marks(module, monkeypatch):
    tables = module("tables")
    monkeypatch.setattr(
        tables, "TABLES", {"a": lambda results: f"| {results['x']} |", "b": lambda results: ""}
    )
    text = "x\n<!-- table:a -->\nold\n<!-- /table -->\ny\n<!-- table:b -->\nold\n<!-- /table -->\nz\n"
    filled = "x\n<!-- table:a -->\n| 1 |\n<!-- /table -->\ny\n<!-- table:b -->\n<!-- /table -->\nz\n"
    assert tables.fill(text, {"a": {"x": 1}}) == filled
    assert tables.fill(filled, {"a": {"x": 1}}) == filled
    with pytest.raises(ValueError, match="marks the table 'c', accepted are a, b"):
        tables.fill("<!-- table:c -->\n<!-- /table -->", {})


def trained(name, seed, dice, **others):
    figures = {
        metric: {"mean": mean, "sd": 0.5}
        for metric, mean in {"dice": dice, "jaccard": 0.5, "hd95": 4.0, "asd": 1.5}.items()
    }
    summary = {"mean": figures, "empty_prediction": 1}
    where = {"cpu": "a cpu", "cores": 2, "versions": {"torch": "2.13"}, "commit": "abc", "command": "python seed=0 a=1"}
    return {
        "name": name, "preset": "paper", "labelled": 4, "seed": seed, "checkpoint": "last", "summary": summary,
        "evaluation": {"head": "linear", "largest_component": False}, "training_minutes": 2.4, "environment": where, **others,
    }  # fmt: skip


def test_training_table_joins_seeds(module):
    table = module("training_tables").training_table
    rows = [trained("mper", 0, 0.8), trained("supervised", 0, 0.7), trained("mper", 1, 0.9)]
    lines = table({"rows": rows}).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:4]]
    assert cells[0] == ["mper", "2", "85.00 ± 5.00", "50.00 ± 0.00", "4.00 ± 0.00", "1.50 ± 0.00", "2", "2"]
    assert cells[1][:4] == ["supervised", "1", "70.00 ± 50.00", "50.00 ± 50.00"]
    assert cells[1][4:] == ["4.00 ± 0.50", "1.50 ± 0.50", "1", "2"]
    assert lines[-1].endswith("the median training. a cpu, torch 2.13, commit abc.")
    assert ", the median training, beside others. " in table({"rows": rows}, ", beside others")
    notes = table({"rows": [*rows, trained("mper", 2, 0.8, text={"source": "random"})]})
    assert notes.endswith("a cpu, torch 2.13, commit abc. Text embeddings: random.")
    assert "deviation of the seeds' means or, of a single seed, the cases;" in notes
    for named, spread in (("mper", "seeds' means;"), ("supervised", "cases;")):
        of_one = [row for row in rows if row["name"] == named]
        assert f"deviation of the {spread}" in table({"rows": of_one})
    later = trained("mper", 2, 0.8, environment={**rows[0]["environment"], "commit": "abd"})
    assert "torch 2.13, commit abc, abd." in table({"rows": [*rows, later]})


def test_evaluations_table_has_a_line_an_evaluation(module):
    rows = [trained("mper", 0, 0.8), trained("mper", 0, 0.9, checkpoint="validation")]
    *_, first, second, _, notes = module("training_tables").evaluations_table({"rows": rows, "note": "Both."}).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in (first, second)]
    assert cells[0][:8] == ["mper", "4", "0", "a=1", "last", "linear", "all", "80.00 ± 50.00"]
    assert cells[1][4] == "validation"
    assert "deviation of the cases;" in notes and notes.endswith("commit abc. Both.")


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"seed": 0}, r"have the seeds \[0, 0\], accepted is each seed once"),
        ({"seed": 1, "labelled": 8}, "differ in labelled, accepted are seeds of one configuration"),
        ({"seed": 1, "checkpoint": "validation"}, "differ in checkpoint, accepted are seeds"),
    ],
)
def test_runs_of_one_name_that_are_not_seeds_of_one_configuration_are_refused(module, other, message):
    tables = module("training_tables")
    results = {"rows": [trained("mper", 0, 0.8), {**trained("mper", 0, 0.9), **other}]}
    for table in (tables.training_table, lambda results: tables.paired_rows(results, results)):
        with pytest.raises(ValueError, match=f"runs of mper {message}"):
            table(results)


def test_gathered_runs_do_not_say_where_they_were(module):
    command = "python -m semiseg.train --config la_mper output=/home/me/run 'dataset.root=/data of mine' seed=1"
    found = module("training_results").without_folders({"command": command, "commit": "abc"})
    assert found == {"command": "python -m semiseg.train --config la_mper seed=1", "commit": "abc"}


def logged_run(path, monkeypatch, stages):
    """A run whose log says how many iterations each stage had, a second each, and a pause of an hour after the 25th."""
    clock = [0.0]
    monkeypatch.setattr(metrics_log.time, "time", lambda: clock[0])
    run, iteration = RunDirectory(path), 0
    with MetricsLog(run) as log:
        for stage, iterations in stages.items():
            for _ in range(iterations):
                iteration += 1
                clock[0] += 3600 if iteration == 26 else 1
                log.add(iteration, stage, {"total": 1.0})
            log.flush()
    return run


def test_minutes_of_a_training_are_without_its_pauses(module, monkeypatch, tmp_path):
    minutes = module("training_results").training_minutes
    assert minutes(logged_run(tmp_path, monkeypatch, {"pre-training": 60, "self-training": 90})) == 2.5


def test_stages_too_short_for_a_pace_are_refused(module, monkeypatch, tmp_path):
    run = logged_run(tmp_path, monkeypatch, {"pre-training": 10, "self-training": 90})
    with pytest.raises(ValueError, match="has 10 iterations of pre-training, accepted are more than 10, to tell a pace"):
        module("training_results").training_minutes(run)


def test_unknown_operation(module):
    workloads = module("workloads")
    with pytest.raises(ValueError, match="^operation is 'sum', accepted are prototype_similarity"):
        workloads.make_operation("sum", workloads.SIZES["tiny"]["2d"])


def test_inputs_do_not_depend_on_the_order_of_operations(module):
    workloads = module("workloads")
    first = workloads.make_operation("prototype_head", workloads.SIZES["tiny"]["3d"])
    workloads.make_operation("dice_ce", workloads.SIZES["tiny"]["3d"])
    again = workloads.make_operation("prototype_head", workloads.SIZES["tiny"]["3d"])
    assert torch.equal(first.x, again.x)


def test_rounding_that_rounds_nothing_changes_no_gradient(module, monkeypatch):
    rounding = module("gradient_rounding")
    monkeypatch.setattr(
        rounding, "ROUNDINGS", {"none": lambda network: rounding.rounded(network, rounding.exact, rounding.exact)}
    )
    config = load_config("phantom_supervised", ["network.filters=[4]", "network.dropout=[0.5]"])
    method = build_method(config, 3, torch.device("cpu"))
    method.network.train()
    image, label = torch.randn(2, 1, 32, 16, 16), torch.randint(0, 3, (2, 32, 16, 16), dtype=torch.uint8)
    (stage,) = method.stages(torch.Generator())
    found = rounding.differences(method, stage, [Batch(image, label, image[:0])], step=0)
    assert found == {"none": 0}


@needs_cpu
def test_profile_of_a_training_step(module, monkeypatch):
    profile, tables = module("training_profile"), module("network_tables")
    small = (
        "training.patch_size=[32, 16, 16]", "evaluation.stride=[32, 16, 16]", "method.zero_box=[20, 10, 10]",
        "network.filters=[4]",
    )  # fmt: skip
    monkeypatch.setitem(profile.WORKLOADS, "phantom_mper", (small, ("background", "a", "b"), (36, 20, 20)))
    monkeypatch.setattr(profile, "PRECISIONS", ("float32",))
    monkeypatch.setattr(profile, "STEPS", {"cpu": 1})
    (row,) = profile.measure("phantom_mper", torch.device("cpu"))
    assert row["steps_per_second"] > 0 and not row["cuda_graph"]
    assert sum(row["shares"].values()) == pytest.approx(1)
    groups = {"convolutions", "batch_norm_relu", "prototype_head", "dice_ce", "largest_components"}
    assert groups < row["shares"].keys() and min(row["shares"].values()) > 0

    where = {"cpu": "a processor", "threads": 2, "versions": {"torch": "2.13.0"}, "commit": "abc"}
    table = tables.training_profile_table({"rows": [row], "environment": where, "command": "python x"})
    assert f"{100 * row['shares']['convolutions']:.1f} %" in table and "phantom_mper" in table


def test_ladder_of_several_rounds(module, monkeypatch, tmp_path):
    ladder, file = module("ladder"), tmp_path / "ladder.json"
    seconds = iter([8.0, 1.0, 5.0, 2.0, 9.0, 4.0])
    monkeypatch.setattr(ladder, "_in_own_process", lambda workload, levers, level: {
        "levers": list(levers), "seconds": next(seconds), "peak_gb": 1.0})  # fmt: skip
    monkeypatch.setattr("sys.argv", ["ladder.py", "--rounds", "3", "--results", str(file)])
    ladder.climb("", ("a",), ("kept heap",), lambda *_: {})
    results = json.loads(file.read_text())
    plain, kept = results["rows"][0]["rungs"]
    assert plain["seconds"] == 8 and kept["seconds"] == 2 and kept["seconds_of_rounds"] == [1, 2, 4]
    table = module("network_tables").ladder_table(results)
    assert " 4.00 |" in table
    assert "a: medians of 3 rounds in which the lines took turns, the widest range 4.00-fold." in table


def test_ladder_on_an_older_processor(module, monkeypatch):
    """The processes of its rungs know what they may use before they start."""
    ladder, calls = module("ladder"), []

    def run(command, env, **_):
        calls.append((command, env))
        return subprocess.CompletedProcess(command, 0, json.dumps({"seconds": 1.0, "peak_gb": 1.0}))

    monkeypatch.setattr(ladder.subprocess, "run", run)
    for level in (None, "v3"):
        monkeypatch.setattr("sys.argv", ["ladder.py", *(("--level", level) if level else ())])
        ladder.climb("", ("a",), (), lambda *_: {})
    (command, environment), (of_level, limited) = calls
    assert "--level" not in command and of_level[-2:] == ["--level", "v3"]
    assert limited.items() - environment.items() == ladder.LEVELS["v3"].items()


@pytest.mark.parametrize(("dataset", "patch"), [("left_atrium", [8, 6, 4]), ("acdc", [10, 8])])
def test_a_plain_trainer_draws_the_same_batches_from_files(module, request, dataset, patch):
    ladder, root = module("training_ladder"), request.getfixturevalue(dataset)
    name = {"left_atrium": "la_supervised", "acdc": "acdc_supervised"}[dataset]
    config = load_config(name, [f"dataset.root={root}", "dataset.labelled=1"])
    augmentation = Augmentation(config.dataset.augmentation, tuple(patch))
    from_files, from_memory = (
        TrainingSampler(ladder.training_data(config, in_memory), augmentation, 1, 1, seed=0)
        for in_memory in (False, True)
    )
    for _ in range(3):
        torch.testing.assert_close(from_files.next(), from_memory.next(), rtol=0, atol=0)


def test_paired_table_takes_the_seeds_both_have(module):
    def results(dice):
        return {"rows": [trained("a", seed, value) for seed, value in dice.items()]}

    (line,) = module("training_tables").paired_rows(
        results({0: 0.5, 1: 0.7, 2: 0.9}), results({1: 0.6, 0: 0.5, 3: 0.1})
    )
    # differences 0 and -10: mean -5, standard deviation 7.07, over the root of 2
    assert line == ["a", "2", "60.00", "55.00", "-5.00", "5.00", "50.00", "50.00"]
    (of_one_seed,) = module("training_tables").paired_rows(results({0: 0.5}), results({0: 0.6}))
    assert of_one_seed == ["a", "1", "50.00", "60.00", "10.00", "–", "50.00", "60.00"]
