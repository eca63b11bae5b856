"""`python -m semiseg.report`: pages that need nothing else, runs against each other, and what is wrong in one line."""

import json
import os
import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from documents import example_with
from scipy import stats

from semiseg import evaluate, report
from semiseg.config import config_to_mapping, load_config
from semiseg.data import open_dataset
from semiseg.data.description import DatasetDescription
from semiseg.data.preprocessing import Preprocessing
from semiseg.engine.checkpoint import save_checkpoint
from semiseg.engine.run_directory import RunDirectory
from semiseg.engine.trainer import build_method
from semiseg.evaluation import pictures as pictures_module
from semiseg.evaluation.metrics import case_metrics, summarise
from semiseg.evaluation.pictures import draw_pictures, prediction_pictures

CLASSES = ("background", "core <b>&", "shell")
CASES = [f"case {number} <i>" for number in range(6)]
VOLUMES = [
    "dataset.labelled=2",
    "network.filters=[2]",
    "training.patch_size=[16, 16, 16]",
    "evaluation.stride=[16, 16, 16]",
    "method.zero_box=[9, 9, 9]",
]
SLICES = ["dataset.labelled=1", "network.filters=[2, 2, 2, 2, 2]", "training.patch_size=[32, 16]"]
VOID = {"meta", "img", "br", "hr", "link", "input"}


class Page(HTMLParser):
    """Checks that elements nest, and collects attributes and text."""

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict]] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.text += data


def assert_self_contained(path: Path) -> Page:
    """A page that parses, names everything, and asks for nothing outside of it."""
    text = path.read_text()
    assert text.startswith("<!DOCTYPE html>")
    page = Page(text)
    for tag, attributes in page.elements:
        assert tag not in ("script", "link", "iframe", "object")
        for name in ("src", "href", "srcset", "data"):
            assert attributes.get(name, "data:").startswith("data:")
        if tag == "img":
            assert attributes["alt"] and attributes["src"].startswith("data:image/png;base64,iVBOR")
    assert "url(" not in text and "@import" not in text
    return page


def results_of(config, dice_shift: int, classes=CLASSES, cases=CASES) -> dict:
    """Results whose predictions are shifted by some voxels, less from case to case."""
    truth = np.zeros((8, 20, 20), np.uint8)
    truth[2:6, 4:14, 4:14] = 1
    truth[3:5, 6:9, 6:9] = 2
    metrics = {
        case: case_metrics(np.roll(truth, dice_shift + number % 3, axis=1), truth, classes, (1.0, 1.0, 2.0))
        for number, case in enumerate(cases)
    }
    return {
        "name": config.name,
        "method": config.method.name,
        "preset": config.preset,
        "dataset": config.dataset.name,
        "labelled": config.dataset.labelled,
        "seed": config.seed,
        "classes": list(classes),
        "cost": {"inference": {"parameters": 1_234_567, "multiply_adds": 8_900_000_000}},
        "evaluation": config_to_mapping(config)["evaluation"],
        "checkpoint": "last",
        "iteration": 5,
        "summary": summarise(metrics),
        "cases": metrics,
        "other_checkpoints": {
            "validation": {"iteration": 3, "summary": summarise(metrics), "cases": metrics}
        },
    }


def make_run(
    folder: Path, name: str, dice_shift: int, overrides=(), config="phantom_supervised", **results
) -> Path:
    """A run directory with results, but neither checkpoint nor pictures."""
    config = load_config(config, overrides)
    run = RunDirectory(folder / name)
    run.path.mkdir(parents=True)
    run.config.write_text(yaml.safe_dump(config_to_mapping(config)))
    environment = {
        "command": "train <script>",
        "cpu": "abacus",
        "cores": 2,
        "versions": {"torch": "2"},
        "commit": "c0ffee-dirty",
    }
    run.environment.write_text(json.dumps(environment))
    run.metrics.write_text('{"iteration": 1, "stage": "supervised", "total": 0.5}\n')
    run.results.write_text(json.dumps({**results_of(config, dice_shift), **results}))
    return run.path


def report_of(*arguments, capsys) -> tuple[int, str, str]:
    """Exit status, output and errors of the command."""
    status = 0
    try:
        report.main([str(argument) for argument in arguments])
    except SystemExit as exit:
        status = exit.code
    return status, *capsys.readouterr()


def test_report_without_test_data_says_what_is_missing(tmp_path, capsys):
    path = make_run(tmp_path, "run", 1, warning="selected on the test set")
    status, output, _ = report_of(path, capsys=capsys)
    assert status == 0 and "could not be drawn" in output and str(path / "report.html") in output
    page = assert_self_contained(path / "report.html")
    for part in (
        "phantom_supervised", "train <script>", "abacus", "c0ffee", "1.23 million parameters", "8.90 billion",
        "selected on the test set", "The code was changed after the commit", "Not all pictures could be drawn", "Checkpoint validation, iteration 3", *CASES, *CLASSES,
    ):  # fmt: skip
        assert part in page.text, part
    summary = json.loads((path / "results.json").read_text())["summary"]["classes"]["shell"]["dice"]
    assert f"{100 * summary['mean']:.2f} ± {100 * summary['sd']:.2f}" in page.text
    assert [tag for tag, _ in page.elements].count("img") == 1  # the learning curves


@pytest.mark.parametrize(("sessions", "names"), [(1, ["command"]), (2, ["command 1", "command 2"])])
def test_a_run_too_old_to_know_its_command_is_reported_once_resumed(sessions, names, tmp_path, capsys):
    path = make_run(tmp_path, "run", 1)
    session = json.loads((path / "environment.json").read_text())
    (path / "environment.json").write_text(json.dumps({"resumed": [session] * sessions}))
    status, _, errors = report_of(path, capsys=capsys)
    assert status == 0, errors
    text = assert_self_contained(path / "report.html").text
    assert re.findall(r"command(?: \d)?(?=\s*train <script>)", text) == names


def test_pictures_take_the_files_of_the_cases_shown_alone(left_atrium, tmp_path, monkeypatch):
    names = ["CASE3", "CASE4", "CASE5", "CASE6"]
    cases = {name: {"left atrium": {"dice": number / 10}} for number, name in enumerate(names)}
    (left_atrium / "test.list").write_text("\n".join(names))
    shutil.rmtree(left_atrium / "2018LA_Seg_Training Set" / "CASE4")
    drawn = []
    monkeypatch.setattr(
        pictures_module, "overlay", lambda case, prediction, _, path, *__: drawn.append((path.stem, case.name, prediction))
    )
    monkeypatch.setattr(pictures_module, "surfaces", lambda *_: None)
    monkeypatch.setattr(pictures_module, "sample_embeddings", lambda *_: (np.zeros((1, 2)), np.zeros(1)))
    monkeypatch.setattr(pictures_module, "embedding_map", lambda *_: None)
    run, config = RunDirectory(tmp_path / "run"), load_config("la_supervised")
    run.path.mkdir()
    method = SimpleNamespace(network=torch.nn.Identity(), num_classes=2, prototypes=None)
    given = run, config, method, open_dataset("la", left_atrium), torch.device("cpu"), cases, lambda case: case.name[-1]
    draw_pictures(*given)
    assert drawn == [("worst", "CASE3", "3"), ("median", "CASE5", "5"), ("best", "CASE6", "6")]
    (left_atrium / "test.list").write_text("\n".join(names[1:]))
    with pytest.raises(ValueError, match="the test split of la has no case CASE3, which the results name"):
        draw_pictures(*given)


@pytest.mark.parametrize("name", ["la_mper", "acdc_supervised"])
def test_evaluation_leaves_a_report_that_can_be_made_again(name, request, tmp_path, monkeypatch, capsys):
    """Of an untrained network on a small dataset, volumes and slices."""
    root = request.getfixturevalue("left_atrium" if name == "la_mper" else "acdc")
    small = VOLUMES if name == "la_mper" else SLICES
    run_path = tmp_path / "run"
    config = load_config(name, [*small, f"dataset.root={root}", f"output={run_path}"])
    dataset = open_dataset(config.dataset.name, root)
    run = RunDirectory.create(config, torch.device("cpu"))
    DatasetDescription.of(dataset).save(run.dataset)
    method = build_method(config, len(dataset.class_names), torch.device("cpu"))
    save_checkpoint(run.checkpoint(), method, iteration=2)
    validated = name != "la_mper"  # the left atrium has no validation split
    if validated:
        other = build_method(config, len(dataset.class_names), torch.device("cpu"))  # whose pictures are not drawn
        save_checkpoint(run.checkpoint("validation"), other, iteration=1)
    monkeypatch.setattr(pictures_module, "VOXELS", 300)  # t-SNE takes seconds for more
    evaluate.main(["--run", str(run_path), "evaluation.largest_component=true"])
    results = json.loads(run.results.read_text())
    assert ("validation" in results.get("other_checkpoints", {})) == validated
    pictures = prediction_pictures(run)
    first = assert_self_contained(run.report)
    assert [tag for tag, _ in first.elements].count("img") == len(pictures) == 7
    contents = {path: path.read_bytes() for path in pictures}
    assert len(set(contents.values())) >= 5  # two test cases, so that one is best or worst and median

    for path in pictures:
        os.utime(path, (0, 0))  # as in a copy
    with monkeypatch.context() as undrawn:
        undrawn.setattr(report, "draw_pictures", None)
        assert report_of(run_path, capsys=capsys)[0] == 0
    run.report.unlink()
    pictures[3].unlink()
    assert report_of(run_path, capsys=capsys)[0] == 0
    assert {path: path.read_bytes() for path in pictures} == contents
    assert assert_self_contained(run.report).text == first.text

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as stopped, pytest.raises(SystemExit):
        stopped.setattr(evaluate, "draw_pictures", stop)
        evaluate.main(["--run", str(run_path)])
    assert not any(path.exists() for path in (*pictures, run.report)), "of the evaluation before"
    evaluate.main(["--run", str(run_path), "evaluation.largest_component=true"])
    assert {path: path.read_bytes() for path in pictures} == contents

    pictures[3].unlink()
    replace(DatasetDescription.of(dataset), preprocessing=Preprocessing("LPS", (9.0, 9.0, 9.0))).save(run.dataset)
    assert "was trained on another dataset" in report_of(run_path, capsys=capsys)[1]
    DatasetDescription.of(dataset).save(run.dataset)
    (root / "test.list").unlink()
    _, output, _ = report_of(run_path, capsys=capsys)
    assert "test.list: missing" in output
    page = assert_self_contained(run.report)
    assert [tag for tag, _ in page.elements].count("img") == 6 and "test.list: missing" in page.text


def test_comparison_of_two_configurations(tmp_path, capsys):
    first = make_run(tmp_path, "first", 2, ["method.iterations=7"])
    other = make_run(tmp_path, "other", 1, ["method.iterations=9"])
    output_file = tmp_path / "against.html"
    status, output, _ = report_of(first, other, "--output", output_file, capsys=capsys)
    assert status == 0
    names = [f"phantom_supervised (method.iterations={number})" for number in (7, 9)]
    dice = []
    for path in (first, other):
        cases = json.loads((path / "results.json").read_text())["cases"]
        dice.append([np.mean([values["dice"] for values in case.values()]) for case in cases.values()])
    differences = 100 * np.subtract(dice[1], dice[0])
    [row] = [line for line in output.splitlines() if line.startswith(f"| {names[1]}") and "Dice" in line]
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[1:3] == ["Dice [%]", f"{differences.mean():+.2f} ± {differences.std():.2f}"]
    assert cells[4:] == ["6", "0", "0"]
    assert 0 < float(cells[3]) < 0.05  # six differences of one sign
    [row] = [line for line in output.splitlines() if line.startswith(f"| {names[1]}") and "ASD [voxel]" in line]
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[2].startswith("-") and cells[4:] == ["6", "0", "0"]  # shorter distances are better ones
    means = f"{100 * np.mean(dice[1]):.2f} ± {100 * np.std(dice[1]):.2f}"
    assert any(line.startswith(f"| {names[1]}") and means in line for line in output.splitlines())
    results = [json.loads((path / "results.json").read_text()) for path in (first, other)]
    shell = [100 * np.array([case["shell"]["dice"] for case in each["cases"].values()]) for each in results]
    [row] = [line for line in output.splitlines() if line.startswith("| shell")]
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    entries = (*shell, shell[1] - shell[0])
    assert [cells[1], cells[2], cells[3].lstrip("+")] == [f"{each.mean():.2f} ± {each.std():.2f}" for each in entries]
    assert cells[4] == f"{stats.wilcoxon(entries[2]).pvalue:.2g}"
    page = assert_self_contained(output_file)
    assert all(part in page.text for part in (*names, *CASES, f"{differences[0]:+.2f}"))


def test_seeds_of_a_configuration_are_one_row(tmp_path, capsys):
    first = make_run(tmp_path, "first", 2)
    seeds = [make_run(tmp_path, f"seed{seed}", seed, [f"seed={seed}"], "phantom_mper") for seed in (0, 1)]
    _, output, _ = report_of(first, *seeds, "--output", tmp_path / "page.html", capsys=capsys)
    means = [
        json.loads((path / "results.json").read_text())["summary"]["mean"]["dice"]["mean"] for path in seeds
    ]
    [row] = [
        line
        for line in output.splitlines()
        if line.startswith("| phantom_mper") and "%" not in line and "|     2 |" in line
    ]
    assert f"{50 * sum(means):.2f} ± {50 * abs(means[0] - means[1]):.2f}" in row


def test_the_documented_table_of_all_cases(tmp_path, monkeypatch):
    make_run(tmp_path / "runs", "mper", 1)
    monkeypatch.chdir(tmp_path)
    exec(compile(example_with("import csv"), "own_data.md", "exec"), {})  # noqa: S102 (our own document)
    lines = (tmp_path / "results.csv").read_text().splitlines()
    assert lines[0].startswith("case,class,unit,empty_prediction,empty_truth,dice,")
    assert len(lines) == 1 + len(CASES) * (len(CLASSES) - 1)


def described(path: Path, spacing: tuple[float, ...], orientation: str | None = None) -> Path:
    DatasetDescription(CLASSES, 3, Preprocessing(orientation, spacing)).save(RunDirectory(path).dataset)
    return path


def test_runs_on_data_prepared_otherwise_are_no_seeds_of_one_thing(tmp_path, capsys):
    fine, coarse = (1.0, 1.0, 1.0), (1.0, 1.0, 2.0)
    runs = [
        described(make_run(tmp_path, f"run{seed}", seed, [f"seed={seed}"]), spacing, orientation)
        for seed, (spacing, orientation) in enumerate([(fine, None), (coarse, None), (fine, "LPS")])
    ]
    status, output, _ = report_of(*runs, "--output", tmp_path / "page.html", capsys=capsys)
    assert status == 0
    rows = [line.split("|")[1:3] for line in output.splitlines() if line.startswith("| phantom_supervised")]
    assert [[cell.strip() for cell in row] for row in rows[:2]] == [
        ["phantom_supervised (preprocessing.spacing=[1.0, 1.0, 1.0])", "2"],
        ["phantom_supervised (preprocessing.spacing=[1.0, 1.0, 2.0])", "1"],
    ]


def test_one_seed_twice_is_no_spread(tmp_path, capsys):
    first = make_run(tmp_path, "first", 2)
    same = [make_run(tmp_path, name, 1, ["seed=3"], "phantom_mper") for name in ("one", "two")]
    status, _, errors = report_of(first, *same, "--output", tmp_path / "page.html", capsys=capsys)
    assert status == 2 and errors == (
        f"error: {same[0]} and {same[1]} have the same configuration and the seed 3; "
        "expected runs of one configuration to have seeds of their own\n"
    )
    assert report_of(*same, "--output", tmp_path / "page.html", capsys=capsys)[0] == 0  # each for itself


def test_runs_of_one_configuration_stand_for_themselves(tmp_path, capsys):
    runs = [make_run(tmp_path, f"seed{seed}", 1 + seed, [f"seed={seed}"]) for seed in (0, 1)]
    status, output, _ = report_of(*runs, "--output", tmp_path / "page.html", capsys=capsys)
    assert status == 0 and str(runs[0]) in output and str(runs[1]) in output


def damaged(path: Path) -> None:
    (path / "results.json").write_text((path / "results.json").read_text()[:300])


def without_a_metric(path: Path) -> None:
    results = json.loads((path / "results.json").read_text())
    del results["cases"][CASES[2]]["shell"]["asd"]
    (path / "results.json").write_text(json.dumps(results))


def a_list(path: Path) -> None:
    (path / "results.json").write_text("[]")


def with_an_evaluation_of_another_kind(path: Path) -> None:
    results = json.loads((path / "results.json").read_text())
    del results["evaluation"]["largest_component"]
    (path / "results.json").write_text(json.dumps(results))


def without_an_evaluation(path: Path) -> None:
    results = json.loads((path / "results.json").read_text())
    (path / "results.json").write_text(json.dumps({**results, "evaluation": None}))


def without_results(path: Path) -> None:
    (path / "results.json").unlink()


def no_run(path: Path) -> None:
    shutil.rmtree(path)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (damaged, "results.json is damaged"),
        (without_a_metric, "'asd' is missing"),
        (a_list, "results.json is damaged"),
        (with_an_evaluation_of_another_kind, "'largest_component' is missing"),
        (without_an_evaluation, "results.json is damaged"),
        (without_results, "results.json is missing: evaluate the run with"),
        (no_run, "is no run directory"),
    ],
)
@pytest.mark.parametrize("several", [False, True])
def test_a_run_without_sound_results_is_refused(spoil, message, several, tmp_path, capsys):
    path = make_run(tmp_path, "run", 1)
    others = [make_run(tmp_path, "whole", 1, ["seed=3"])] if several else []
    spoil(path)
    status, _, errors = report_of(*others, path, "--output", tmp_path / "page.html", capsys=capsys)
    assert status == 2 and len(errors.splitlines()) == 1 and message in errors
    assert not list(tmp_path.glob("**/*.html"))


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"overrides": ["dataset.cohort_seed=1"]}, "of phantom (cohort 1)"),
        ({"config": "la_supervised"}, "cases of la"),
    ],
)
def test_runs_tested_on_other_cases_are_refused(other, message, tmp_path, capsys):
    paths = make_run(tmp_path, "one", 1), make_run(tmp_path, "two", 1, **other)
    status, _, errors = report_of(*paths, "--output", tmp_path / "page.html", capsys=capsys)
    assert status == 2 and message in errors and "expected the same test cases" in errors


def test_other_case_names_and_a_run_twice_are_refused(tmp_path, capsys):
    one, two = make_run(tmp_path, "one", 1), make_run(tmp_path, "two", 1, ["seed=1"])
    assert "is given twice" in report_of(one, one, capsys=capsys)[2]
    results = json.loads((two / "results.json").read_text())
    results["cases"]["another"] = results["cases"].pop(CASES[0])
    (two / "results.json").write_text(json.dumps(results))
    assert "expected the same test cases" in report_of(one, two, capsys=capsys)[2]


@pytest.mark.parametrize(("first", "second", "refused"), [("a", "b", True), ("a", "a", False), ("a", None, False)])
def test_cases_of_the_same_names_with_other_labels_are_refused(first, second, refused, tmp_path, capsys):
    """As of two hospitals that count their patients; results of older versions do not tell."""
    labels = [{} if value is None else {"labels": value} for value in (first, second)]
    paths = [
        make_run(tmp_path, f"run {number}", 1, [f"seed={number}"], **given) for number, given in enumerate(labels)
    ]
    status, _, errors = report_of(*paths, "--output", tmp_path / "page.html", capsys=capsys)
    assert status == (2 if refused else 0) and ("but other labels" in errors) == refused


def test_output_that_is_no_page_or_in_no_folder_is_refused(tmp_path, capsys):
    path = make_run(tmp_path, "run", 1)
    for output in (tmp_path / "no" / "page.html", tmp_path / "page.pdf", tmp_path):
        status, _, errors = report_of(path, "--output", output, capsys=capsys)
        assert status == 2 and "--output is" in errors


def test_a_report_that_cannot_be_written_is_refused_before_pictures_are_drawn(tmp_path, monkeypatch, capsys):
    path = make_run(tmp_path, "run", 1)
    monkeypatch.setattr(report, "complete_pictures", None)
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write everywhere
    for options in ([], ["--output", tmp_path / "page.html"]):
        status, _, errors = report_of(path, *options, capsys=capsys)
        assert status == 2 and ".html: cannot be written, as the folder" in errors
