"""`python -m semiseg.train` and `semiseg.evaluate` from end to end on a tiny phantom, and what a run leaves behind."""

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from h5_files import write_left_atrium
from safetensors.torch import load_file
from small_runs import MPER, SLICES, VOLUMES, iterations
from torch import nn
from untrained_runs import untrained_run

from semiseg import evaluate
from semiseg import train as train_module
from semiseg.atomic import write_json
from semiseg.config import load_config
from semiseg.data.left_atrium import LeftAtrium
from semiseg.data.preprocessing import Intensity, Preprocessing
from semiseg.engine import trainer
from semiseg.engine.checkpoint import load_checkpoint, read_tensors, save_checkpoint
from semiseg.engine.distributed import Processes
from semiseg.engine.interruption import Interruption
from semiseg.engine.metrics_log import INTERVAL, MetricsLog
from semiseg.engine.run_directory import RunDirectory
from semiseg.engine.trainer import Training, build_method, build_optimiser, choose_device, train
from semiseg.engine.training_step import TrainingStep
from semiseg.methods.method import Batch
from semiseg.text import random_text
from semiseg.train import main

TINY = ["training.patch_size=[32, 32, 16]", "evaluation.stride=[32, 32, 16]", "network.filters=[2]"]
TINY_MPER = [*TINY, "method.pretraining_iterations=2", "method.iterations=3", "method.zero_box=[20, 20, 10]"]
TINY_SUPERVISED = [*TINY, "method.iterations=3"]
LEFT_ATRIUM_MPER = [*VOLUMES, *MPER, "method.zero_box=[20, 10, 10]"]
TWO_NETWORKS = ["method.branches=two_networks", "method.voxel_prompt=false", "method.text_consistency=false"]


def command(verb, *arguments, cwd):
    line = [sys.executable, "-m", f"semiseg.{verb}", *arguments]
    return subprocess.run(line, capture_output=True, text=True, cwd=cwd, check=False)


@pytest.fixture(scope="module")
def two_runs(tmp_path_factory):
    """The same command twice."""
    folder = write_left_atrium(tmp_path_factory.mktemp("runs"))
    for _ in range(2):
        result = command(
            "train", "--config", "la_mper", *LEFT_ATRIUM_MPER, f"dataset.root={folder}", cwd=folder
        )
        assert result.returncode == 0, result.stderr
    return folder / "runs" / "la_mper", folder / "runs" / "la_mper-2"


def test_a_run_leaves_everything_behind(two_runs):
    run = RunDirectory(two_runs[0])
    config = yaml.safe_load(run.config.read_text())
    assert config["method"]["iterations"] == 4 and config["method"]["num_prototypes"] == 3
    lines = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    steps = [line for line in lines if "total" in line]
    assert [line["iteration"] for line in steps] == [1, 2, 3, 4, 5, 6, 7]
    assert [line["stage"] for line in steps] == ["pre-training"] * 3 + ["self-training"] * 4
    for path in (
        run.learning_curves,
        *(run.overlays / f"{name}.png" for name in ("best", "median", "worst")),
    ):
        assert path.read_bytes().startswith(b"\x89PNG"), path
    assert list(run.tensorboard.iterdir()) and run.checkpoint().is_file()
    assert not [path for path in run.path.rglob("*") if path.name.startswith(".")]


def test_results_hold_every_case_class_and_metric(two_runs):
    results = json.loads(RunDirectory(two_runs[0]).results.read_text())
    assert results["checkpoint"] == "last" and results["iteration"] == 7
    assert len(results["cases"]) == 2
    metrics = {"dice", "jaccard", "hd95", "asd", "hd95_mm", "assd_mm"}
    for case in results["cases"].values():
        assert set(case) == set(results["classes"][1:])
        assert all(metrics <= set(values) for values in case.values())
    cases = sorted(LeftAtrium(two_runs[0].parent.parent).evaluation_cases("test"), key=lambda case: case.name)
    labels = [hashlib.sha256(case.label.tobytes()).digest() for case in cases]
    assert results["labels"] == hashlib.sha256(b"".join(labels)).hexdigest()


def test_the_same_seed_gives_the_same_results(two_runs):
    first, second = (RunDirectory(path) for path in two_runs)
    assert first.results.read_bytes() == second.results.read_bytes()
    weights = [load_file(run.checkpoint()) for run in (first, second)]
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())


def test_evaluate_again_with_another_head(two_runs):
    run = RunDirectory(two_runs[1])
    result = command("evaluate", "--run", str(run.path), "evaluation.head=mean", cwd=run.path)
    assert result.returncode == 0, result.stderr
    assert json.loads(run.results.read_text())["evaluation"]["head"] == "mean"
    refused = command("evaluate", "--run", str(run.path), "method.iterations=3", cwd=run.path)
    assert refused.returncode == 2 and len(refused.stderr.strip().splitlines()) == 1


CLASSES, PREPROCESSING = LeftAtrium.class_names, LeftAtrium.preprocessing
CT = Preprocessing(None, PREPROCESSING.spacing, (Intensity("fixed", (-125.0, 275.0), 80.0, 60.0),))


@pytest.mark.parametrize(
    ("class_names", "preprocessing", "overrides", "message"),
    [
        (
            ("left atrium", "background"),
            PREPROCESSING,
            [],
            "class_names was ('left atrium', 'background') and is ('background', 'left atrium') in the one given",
        ),
        (
            CLASSES,
            Preprocessing(None, (1.0, 1.0, 3.0)),
            [],
            "spacing was (1.0, 1.0, 3.0) and is (0.625, 0.625, 0.625) in the one given",
        ),
        (CLASSES, CT, [], "channels was ({'kind': 'fixed', "),
        (
            CLASSES,
            PREPROCESSING,
            ["evaluation.batch=2", "dataset.labelled=5"],
            "override 'dataset.labelled=5', accepted for a run that exists are keys of evaluation, dataset.root",
        ),
    ],
)
def test_evaluation_refuses_what_the_run_was_not_trained_on(
    class_names, preprocessing, overrides, message, left_atrium, capsys
):
    path = untrained_run(left_atrium / "run", "la_supervised", preprocessing, class_names)
    with pytest.raises(SystemExit) as ended:
        evaluate.main(["--run", str(path), f"dataset.root={left_atrium}", *overrides])
    (line,) = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2 and message in line and not RunDirectory(path).results.exists()


def test_a_run_described_without_an_orientation_goes_with_any(left_atrium):
    """As older versions described the left atrium."""
    described = Preprocessing(None, PREPROCESSING.spacing)
    path = untrained_run(left_atrium / "run", "la_supervised", described, CLASSES)
    RunDirectory(path).check_dataset(LeftAtrium(left_atrium))


@pytest.mark.parametrize(("best", "others"), [(6, ["validation"]), (7, [])])
def test_the_same_weights_are_evaluated_once(best, others, left_atrium, monkeypatch):
    preprocessing, names = LeftAtrium.preprocessing, LeftAtrium.class_names
    path = untrained_run(left_atrium / "run", "la_supervised", preprocessing, names, (f"dataset.root={left_atrium}",))
    run, config = RunDirectory.open(path)
    method = build_method(config, 2, torch.device("cpu"))
    load_checkpoint(run.checkpoint(), method)
    save_checkpoint(run.checkpoint("validation"), method, iteration=best)  # the last one is of iteration 7
    evaluated = []
    evaluate_cases = evaluate.evaluate_cases
    monkeypatch.setattr(evaluate, "evaluate_cases", lambda *given: evaluated.append(given) or evaluate_cases(*given))
    monkeypatch.setattr(evaluate, "draw_pictures", lambda *_: None)
    results = evaluate.evaluate(config, run)
    assert len(evaluated) == 1 + len(others) and list(results["other_checkpoints"]) == others


def test_an_evaluation_that_fails_is_told_with_how_to_repeat_it(tmp_path, monkeypatch, capsys):
    run = RunDirectory(untrained_run(tmp_path / "a run"))
    killed = SimpleNamespace(run=lambda *_, **__: SimpleNamespace(returncode=-9))
    monkeypatch.setattr(train_module, "subprocess", killed)
    with pytest.raises(SystemExit) as ended:
        main(["--resume", str(run.path), "dataset.root=moved", "training.checkpoint_minutes=1"])
    assert ended.value.code == 137
    assert capsys.readouterr().err == (
        f"{run.path} is trained, but its evaluation ended with status 137: "
        f"repeat it with `python -m semiseg.evaluate --run '{run.path}' dataset.root=moved`\n"
    )


def test_the_seed_decides_the_weights_and_the_stages_random_numbers(left_atrium):
    trainings = []
    for seed in (3, 3, 4):
        overrides = [*LEFT_ATRIUM_MPER, f"dataset.root={left_atrium}", f"seed={seed}"]
        training = Training(load_config("la_mper", overrides), None, ExitStack())
        assert training.generator.initial_seed() == seed
        trainings.append(next(training.method.network.parameters()))
    assert torch.equal(trainings[0], trainings[1]) and not torch.equal(trainings[0], trainings[2])


def test_stages_draw_other_batches(left_atrium):
    """The first those of a run with that stage alone."""

    def first_batches(config, *overrides):
        config = load_config(config, [*VOLUMES, *overrides, f"dataset.root={left_atrium}", "seed=3"])
        return [sampler.next()[0] for sampler in Training(config, None, ExitStack()).samplers]

    pretraining, self_training = first_batches("la_mper", "method.zero_box=[20, 10, 10]")
    (supervised,) = first_batches("la_supervised")
    assert torch.equal(pretraining, supervised) and not torch.equal(pretraining, self_training)


def test_two_runs_that_begin_together_get_folders_of_their_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Path, "exists", lambda path: False)  # each looks before the other has made one
    config = load_config("phantom_supervised", TINY)
    runs = [RunDirectory.create(config, torch.device("cpu")) for _ in range(2)]
    assert [run.path.name for run in runs] == ["phantom_supervised", "phantom_supervised-2"]


def test_supervised_and_its_only_head(tmp_path):
    config = load_config("phantom_supervised", [*TINY_SUPERVISED, f"output={tmp_path / 'run'}"])
    assert train(config).checkpoint().is_file()
    with pytest.raises(ValueError, match="accepted here are linear"):
        load_config("phantom_supervised", ["evaluation.head=mean"])


def test_selecting_on_the_test_set_warns_and_says_so(tmp_path):
    write_left_atrium(tmp_path)
    selected = ["evaluation.select=test", "evaluation.validation_interval=2"]
    overrides = [*VOLUMES, *selected, "method.iterations=2", f"dataset.root={tmp_path}"]
    result = command("train", "--config", "la_supervised", *overrides, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "WARNING: the checkpoint is selected on the test set" in result.stdout + result.stderr
    results = json.loads((tmp_path / "runs" / "la_supervised" / "results.json").read_text())
    assert results["checkpoint"] == "test" and "selected on the test set" in results["warning"]


def test_the_checkpoint_selected_is_of_the_last_stage(tmp_path, monkeypatch):
    """Before it the prototypes are none."""
    dice = iter([0.1, 0.2, 0.15])
    monkeypatch.setattr(trainer, "split_dice", lambda *_: next(dice))
    selected = ["evaluation.select=validation", "evaluation.validation_interval=1"]
    run = train(load_config("phantom_mper", [*TINY_MPER, *selected, f"output={tmp_path / 'run'}"]))
    assert read_tensors(run.checkpoint("validation"))[1]["iteration"] == "4"
    assert next(dice, None) is None


def test_folders_that_cannot_be_written_are_named_before_the_work(monkeypatch, left_atrium, tmp_path):
    """Before a training reads its data, and before an evaluation predicts anything."""
    finished = untrained_run(tmp_path / "finished")
    (tmp_path / "empty").mkdir()
    monkeypatch.setattr(LeftAtrium, "training_cases", None)
    monkeypatch.setattr(evaluate, "evaluate", None)
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write everywhere
    for output in ("new", "empty"):
        options = [*LEFT_ATRIUM_MPER, f"dataset.root={left_atrium}", f"output={tmp_path / output}"]
        with pytest.raises(PermissionError, match=f"{output}.* cannot be written"):
            train(load_config("la_mper", options))
    with pytest.raises(PermissionError, match="results.json: cannot be written"):
        evaluate.main.__wrapped__(["--run", str(finished)])


def test_an_empty_folder_in_one_that_cannot_be_written_is_accepted(monkeypatch, tmp_path):
    """Such as a container's mount."""
    (tmp_path / "out").mkdir()
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name == "out")
    RunDirectory.check_new(load_config("phantom_supervised", [f"output={tmp_path / 'out'}"]))


def test_a_run_without_output_needs_the_folder_of_runs_alone(monkeypatch, tmp_path):
    """One of its name that exists already may be read-only or a colleague's: the run gets a folder beside it."""
    monkeypatch.chdir(tmp_path)
    config = load_config("phantom_supervised")
    (tmp_path / "runs" / config.name).mkdir(parents=True)
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name == "runs")
    RunDirectory.check_new(config)
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != "runs")
    with pytest.raises(PermissionError, match="the folder .*runs is not writable"):
        RunDirectory.check_new(config)


@pytest.mark.parametrize("written", [False, True])
def test_what_is_missing_or_in_the_way_is_found_before_the_data_is_read(written, monkeypatch, left_atrium, tmp_path):
    monkeypatch.setattr(LeftAtrium, "training_cases", None)
    output = tmp_path / "output"
    if written:
        output.mkdir()
        (output / "precious.txt").write_text("keep")
        message = f"^output is {output}, which exists already"
    else:
        (left_atrium / "test.list").write_text("missing\n")
        message = "missing"
    config = load_config(
        "la_mper",
        [*LEFT_ATRIUM_MPER, f"dataset.root={left_atrium}", f"output={output}", "evaluation.select=test",
         "evaluation.validation_interval=1"],
    )  # fmt: skip
    with pytest.raises((ValueError, OSError), match=message):
        train(config)


@pytest.mark.parametrize(
    ("configuration", "overrides", "message"),
    [
        ("la_mper", ["dataset.augmentation=foo"], "augmentation is 'foo', accepted are"),
        ("la_mper", ["dataset.augmentation=rotate_flip_resize"], "with rotate_flip_resize are 2 positive sizes"),
        ("la_vclipseg", ["method.text=file", "method.text_file=nowhere.npz"], "'nowhere.npz', which does not exist"),
        ("la_vclipseg", ["method.clip_model=."], "method.text=clip cannot load '.'"),
        ("acdc_supervised", ["dataset.name=la"],
         "unet takes 2D images, but dataset.name=la gives 3D ones, accepted is vnet"),
        ("la_supervised", [*VOLUMES, "training.precision=bfloat16", "training.device=cpu"],
         "training.precision is bfloat16 and training.patch_size [32, 16, 16]"),
        ("la_supervised", ["training.cuda_graph=true", "training.device=cpu"], "training.cuda_graph is true on cpu"),
    ],
)  # fmt: skip
def test_mistakes_that_need_no_data_are_found_before_it_is_read(
    configuration, overrides, message, monkeypatch, left_atrium, tmp_path
):
    monkeypatch.setattr(LeftAtrium, "training_cases", None)
    output = tmp_path / "run"
    with pytest.raises((ValueError, OSError), match=re.escape(message)):
        train(load_config(configuration, [*overrides, f"dataset.root={left_atrium}", f"output={output}"]))
    assert not output.exists()


def test_volumes_are_no_slices(acdc, tmp_path):
    config = load_config("la_supervised", [*VOLUMES, "dataset.name=acdc", f"dataset.root={acdc}"])
    with pytest.raises(ValueError, match="vnet takes 3D images, but dataset.name=acdc gives 2D ones, accepted is unet"):
        train(config)


@pytest.mark.parametrize("configuration", ["la_supervised", "acdc_supervised"])
def test_cases_that_were_trained_on_are_no_test_cases(configuration, request, tmp_path, monkeypatch, capsys):
    """Of a dataset that was divided anew: ACDC's patients are trained on slice by slice and tested as volumes."""
    name = configuration.split("_")[0]
    root = request.getfixturevalue({"la": "left_atrium", "acdc": "acdc"}[name])
    small = VOLUMES if name == "la" else [*SLICES, "evaluation.validation_interval=0"]
    overrides = [*small, "method.iterations=1", f"dataset.root={root}", f"output={tmp_path / 'run'}"]
    config = load_config(configuration, overrides)
    run = train(config)
    trained = run.training_cases.read_text().split()
    listed = root / {"la": "train.list", "acdc": "train_slices.list"}[name]
    assert sorted(trained) == sorted(listed.read_text().split())
    test = {"la": "CASE2", "acdc": "patient011_frame01"}[name]  # unlabelled
    (root / "test.list").write_text(f"{test}\n")
    monkeypatch.setattr(evaluate, "evaluate_cases", None)
    with pytest.raises(SystemExit) as ended:
        evaluate.main(["--run", str(run.path), f"dataset.root={root}"])
    *_, line = capsys.readouterr().err.splitlines()
    patient = test.split("_")[0]
    assert ended.value.code == 2
    assert f"was trained on {patient!r}, and the dataset given has the test case {test!r}" in line
    run.training_cases.unlink()  # as of a run that is too old
    with pytest.raises(TypeError):  # it comes to its predictions
        evaluate.main(["--run", str(run.path), f"dataset.root={root}"])


def test_output_that_exists_is_refused_before_training(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "precious.txt").write_text("keep")
    result = command("train", "output=run", *TINY_MPER, cwd=tmp_path)
    assert result.returncode == 2
    assert (
        result.stderr.strip()
        == "error: output is run, which exists already, accepted is a new or an empty folder"
    )
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["precious.txt"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["training.labelled_batch=3"], "two equal even numbers"),
        (["method.zero_box=[99, 1, 1]"], "within the patch"),
        (["training.device=abacus"], "training.device is 'abacus'"),
        (["training.patch_size=[40, 40, 24]"], "multiples of 16"),
        (["dataset.labelled=4000"], "4000"),
        (["seed=1", "--config", "phantom_mper", "dataset.labelled=4000"], "4000"),
        ([r'output="a\0b"'], r"'a\x00b/config.yaml': no file can have this name"),
        (["--config", "la_mper", "dataset.root=nowhere"], "nowhere"),
    ],
)
def test_bad_input_ends_in_one_line(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert ended.value.code == 2 and message in line and not list(tmp_path.iterdir())


@pytest.mark.parametrize(("initialisation", "factor"), [("he", 2), ("pytorch", 1 / 3)])
@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("phantom_supervised", []),
        ("phantom_mper", []),
        ("phantom_vclipseg", []),
        ("phantom_vclipseg", TWO_NETWORKS),
        ("acdc_mper", []),
    ],
)
def test_initial_weights(name, overrides, initialisation, factor):
    """Their variance is 2 / fan in by He, 1 / (3 fan in) by PyTorch."""
    method = build_method(
        load_config(name, [*overrides, f"network.initialisation={initialisation}"]),
        3,
        choose_device("cpu"),
        random_text(3, 64, 0),
    )
    learned = [layer for layer in method.modules() if isinstance(layer, nn.Conv2d | nn.Conv3d)]
    ratios = [
        layer.weight.var() * layer.weight[0].numel() for layer in learned if layer.weight.numel() > 10_000
    ]
    if name.endswith("mper"):  # copied, which another draw would not be
        pairs = zip(method.network.parameters(), method.teacher.parameters(), strict=True)
        assert all(torch.equal(student, teacher) for student, teacher in pairs)
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    assert all(layer.weight.is_contiguous(memory_format=formats[layer.weight.dim()]) for layer in learned)
    assert len(ratios) > 5 and torch.stack(ratios).tolist() == pytest.approx([factor] * len(ratios), rel=0.1)


def test_the_network_has_the_dropout_and_the_embedding_of_its_configuration():
    overrides = ["network.filters=[2]", "network.dropout=[0.3]", "network.embedding_after_dropout=true"]
    network = build_method(load_config("phantom_mper", overrides), 3, torch.device("cpu")).network
    assert network.encoder.dropout.probability == network.dropout.probability == 0.3
    assert network.embedding_after_dropout


@pytest.mark.parametrize(
    ("name", "precision"),
    [("phantom_supervised", "float32"), ("phantom_mper", "bfloat16"), ("phantom_vclipseg", "float32")],
)
def test_a_step_is_stochastic_gradient_descent(name, precision):
    """With momentum, weight decay and a learning rate that is cut tenfold every three iterations."""
    overrides = [
        "training.learning_rate=0.1", "training.momentum=0.6", "training.weight_decay=0.2",
        f"training.precision={precision}", "method.learning_rate_step=3", "network.filters=[2]",
    ]  # fmt: skip
    config, device = load_config(name, overrides), torch.device("cpu")
    method = build_method(config, 3, device, random_text(3, 64, 0))
    stage = method.stages(torch.Generator())[-1]
    weight = method.network.encoder.stages[0][0].weight
    gradient = torch.randn_like(weight)
    in_bfloat16, weights_at_update = [], []

    def parts(batch, inputs):
        in_bfloat16.append(torch.is_autocast_enabled("cpu"))
        yield {"total": (weight * gradient).sum()}

    stage.inputs, stage.parts = lambda batch, iteration: {}, parts
    stage.update = lambda: weights_at_update.append(weight.detach().clone())
    step = TrainingStep(config, method, stage, build_optimiser(config, method), device, Processes())
    expected, velocity = weight.detach().double(), 0.0
    for iteration, learning_rate in enumerate([0.1, 0.1, 0.1, 0.01, 0.01, 0.01, 0.001]):
        step(Batch(*torch.zeros(3, 1)), iteration)
        velocity = 0.6 * velocity + gradient + 0.2 * expected
        expected = expected - learning_rate * velocity
        torch.testing.assert_close(weight.detach(), expected.float())
        assert torch.equal(weights_at_update[iteration], weight)
    assert in_bfloat16 == [precision == "bfloat16"] * 7


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_iteration(tmp_path):
    run = RunDirectory(tmp_path)
    with MetricsLog(run) as log, pytest.raises(FloatingPointError, match="nan at iteration 2"):
        log.add(1, "supervised", {"total": torch.tensor(1.0)})
        for iteration in range(2, INTERVAL + 1):
            log.add(iteration, "supervised", {"total": torch.tensor(float("nan"))})
    assert iterations(run) == [1]


def test_checkpoints_refuse_damage_and_other_configurations(tmp_path):
    device = choose_device("cpu")
    method = build_method(load_config("phantom_mper", TINY_MPER), 3, device)
    path = tmp_path / "last.safetensors"
    save_checkpoint(path, method, iteration=5)
    other = build_method(load_config("phantom_mper", TINY_MPER), 3, device)
    assert load_checkpoint(path, other) == {"iteration": "5"}
    for name, tensor in method.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name])
    with pytest.raises(ValueError, match="does not fit the configuration"):
        load_checkpoint(path, build_method(load_config("phantom_mper", TINY_MPER), 2, device))
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="is damaged"):
        load_checkpoint(path, other)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load_checkpoint(tmp_path / "other.safetensors", other)


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "last.safetensors"
    method = build_method(load_config("phantom_mper", TINY_MPER), 3, choose_device("cpu"))
    save_checkpoint(path, method, iteration=1)
    before = path.read_bytes()

    def full(descriptor):
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="disk full"):
        save_checkpoint(path, method, iteration=2)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == [path.name]


def test_json_that_others_cannot_read_is_not_written(tmp_path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "results.json", {"dice": float("nan")})
    assert not list(tmp_path.iterdir())


def test_of_two_runs_in_one_folder_the_second_is_refused(tmp_path, monkeypatch):
    """Also where both found it empty."""
    config = load_config("phantom_supervised", [f"output={tmp_path / 'run'}"])
    monkeypatch.setattr(RunDirectory, "check_new", staticmethod(lambda config: None))
    first = RunDirectory.create(config, torch.device("cpu"))
    before = first.config.stat().st_ino
    with first.locked(), pytest.raises(ValueError, match="which exists already, accepted is a new or an empty folder"):
        RunDirectory.create(config, torch.device("cpu"))
    assert first.config.stat().st_ino == before


@pytest.mark.parametrize(("output", "path"), [("~/run", "home/run"), ("~of-nobody/run", "~of-nobody/run")])
def test_folders_may_begin_with_a_tilde(output, path, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    config = load_config("phantom_supervised", [f"output={output}"])
    RunDirectory.check_new(config)
    assert RunDirectory.create(config, torch.device("cpu")).path.resolve() == tmp_path / path
    with pytest.raises(ValueError, match="exists already"):
        RunDirectory.check_new(config)


@pytest.mark.parametrize("output", ["output=link", "output=link/run", None])
def test_a_link_may_lead_to_a_folder_that_is_gone(output, tmp_path, monkeypatch):
    """Such as one to a disk that is cleaned from time to time."""
    monkeypatch.chdir(tmp_path)
    Path("link" if output else "runs").symlink_to(tmp_path / "gone" / "long ago")
    run = RunDirectory.create(load_config("phantom_supervised", [output] if output else []), torch.device("cpu"))
    assert run.config.resolve().is_relative_to(tmp_path / "gone" / "long ago")


def test_an_ignored_signal_stays_ignored():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with Interruption() as interruption:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGTERM)
        assert interruption.signal == signal.SIGTERM
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
