"""Stopping a run and resuming it: nothing differs from a run that was never stopped."""

import dataclasses
import errno
import fcntl
import json
import os
import signal
import threading
from types import SimpleNamespace

import pytest
import torch
from small_runs import MPER, SLICES, TWO_CHANNELS, VOLUMES, assert_same_run, iterations

from semiseg.config import load_config
from semiseg.data import TrainingSampler
from semiseg.data.description import DatasetDescription
from semiseg.engine import run_directory, trainer
from semiseg.engine.checkpoint import read_tensors, write_tensors
from semiseg.engine.interruption import Interrupted, Interruption
from semiseg.engine.run_directory import RunDirectory
from semiseg.engine.trainer import train
from semiseg.engine.training_state import METADATA, save_training_state
from semiseg.methods.supervised import SupervisedStage

SUPERVISED = ("left_atrium", "la_supervised", [*VOLUMES, "method.iterations=4"])
RUNS = {
    "mper in 3D": ("left_atrium", "la_mper", [*VOLUMES, *MPER, "method.zero_box=[10, 10, 10]"]),
    "mper in 2D": ("acdc", "acdc_mper", [*SLICES, *MPER, "method.zero_box=[10, 10]"]),
    "mper, teacher in eval mode": (
        "acdc",
        "acdc_mper",
        [*SLICES, *MPER, "method.zero_box=[10, 10]", "method.teacher_mode=eval", "preset=released"],
    ),
    "mper in bfloat16": (
        "left_atrium",
        "la_mper",
        [
            *VOLUMES,
            *MPER,
            "method.zero_box=[10, 10, 10]",
            "training.patch_size=[48, 16, 16]",
            "training.precision=bfloat16",
        ],
    ),
    "vclipseg": ("left_atrium", "la_vclipseg", [*VOLUMES, "method.text=random", "method.iterations=4"]),
    "supervised": (*SUPERVISED[:2], [*SUPERVISED[2], "method.learning_rate_step=2"]),
    **TWO_CHANNELS,
}


@pytest.fixture
def configured(request, tmp_path):
    """Configurations of RUNS with an output folder in tmp_path."""

    def configure(run, output, *overrides):
        folder, config, own = run
        root = request.getfixturevalue(folder)
        return load_config(config, [*own, f"dataset.root={root}", f"output={tmp_path / output}", *overrides])

    return configure


def count_calls(monkeypatch, owner, name, before):
    """Have `before(number of the call, counted from 1)` called before a method."""
    calls, method = [], getattr(owner, name)

    def counted(self, *arguments):
        calls.append(name)
        before(len(calls))
        return method(self, *arguments)

    monkeypatch.setattr(owner, name, counted)


def interrupt_at(monkeypatch, batch):
    """Let Ctrl-C come while a batch is drawn."""
    count_calls(
        monkeypatch,
        TrainingSampler,
        "next",
        lambda call: signal.raise_signal(signal.SIGINT) if batch in (call, "every") else None,
    )


@pytest.mark.parametrize("name", RUNS)
def test_a_run_stopped_at_every_step_equals_one_that_never_was(name, configured, tmp_path, monkeypatch):
    expected = train(configured(RUNS[name], "whole"))
    config = configured(RUNS[name], "stopped")
    interrupt_at(monkeypatch, "every")
    resume = None
    for _ in iterations(expected):
        with pytest.raises(Interrupted):
            train(config, resume)
        resume = RunDirectory(tmp_path / "stopped")
        torch.manual_seed(os.getpid())  # where a new process would be
    assert resume.is_finished
    assert_same_run(resume, expected)


def test_prototypes_are_clustered_once(configured, tmp_path, monkeypatch):
    from semiseg.methods import mper

    config = configured(RUNS["mper in 2D"], "run")
    interrupt_at(monkeypatch, 5)  # the second step of self-training
    with pytest.raises(Interrupted) as stopped:
        train(config)
    assert str(stopped.value) == (
        "stopped by SIGINT after iteration 5 of 7: resume it with "
        f"`python -m semiseg.train --resume {tmp_path / 'run'}`"
    )
    monkeypatch.setattr(mper, "cluster_embeddings", lambda *_: pytest.fail("clustered again"))
    assert train(config, RunDirectory(tmp_path / "run")).is_finished


def test_a_second_signal_stops_at_once_and_says_how_to_resume(configured, tmp_path, monkeypatch):
    def interrupt_twice(call):
        if call == 3:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)

    config = configured(SUPERVISED, "run")
    count_calls(monkeypatch, TrainingSampler, "next", interrupt_twice)
    with pytest.raises(Interrupted) as stopped:
        train(config)
    assert stopped.value.status == 130 and str(stopped.value) == (
        "stopped by SIGINT within a step: resume it after iteration 0 of 4 with "
        f"`python -m semiseg.train --resume {tmp_path / 'run'}`"
    )
    assert train(config, RunDirectory(tmp_path / "run")).is_finished


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda names: names[::-1], r"is trained on CASE\d as training case 1, and the dataset given has CASE\d there"),
        (lambda names: names[:-1], r"is trained on CASE\d as training case \d, and the dataset given has none there"),
    ],
    ids=["another order", "one fewer"],
)
def test_a_run_is_resumed_with_its_own_training_cases(change, message, configured, left_atrium, tmp_path, monkeypatch):
    """Else it could learn from what it is tested on, and the batches would no longer be those of its seed."""
    config = configured(SUPERVISED, "run")
    interrupt_at(monkeypatch, 2)
    with pytest.raises(Interrupted):
        train(config)
    names = (left_atrium / "train.list").read_text().split()
    (left_atrium / "train.list").write_text("\n".join(change(names)))
    with pytest.raises(ValueError, match=message):
        train(config, RunDirectory(tmp_path / "run"))
    (left_atrium / "train.list").write_text("\n".join(names))
    assert train(config, RunDirectory(tmp_path / "run")).is_finished


@pytest.mark.parametrize(
    ("pretraining", "left"),
    [(1, "; the last good checkpoint is {run}/training_state.safetensors, of iteration 0"), (0, "")],
)
def test_a_pre_training_that_diverges_says_so(pretraining, left, configured, tmp_path, monkeypatch):
    """And not what clustering makes of it."""
    if not pretraining:  # then it is the network's start that is not finite
        build = trainer.build_method
        monkeypatch.setattr(trainer, "build_method", lambda *given: with_infinite_weights(build(*given)))
    config = configured(
        RUNS["mper in 2D"], "run", f"method.pretraining_iterations={pretraining}", "training.learning_rate=1e38"
    )
    with pytest.raises(FloatingPointError) as ended:
        train(config)
    expected = "the embeddings of the labelled images hold NaN or infinity" + left.format(run=tmp_path / "run")
    assert str(ended.value) == expected
    assert iterations(RunDirectory(tmp_path / "run")) == list(range(1, pretraining + 1))


def with_infinite_weights(method):
    next(method.network.parameters()).data.fill_(float("inf"))
    return method


@pytest.mark.parametrize(
    ("interval", "evaluated", "expected"),
    [(1, [4, 5, 6, 7], [(0, -1.0), (4, 0.5), (6, 0.6)]), (3, [6, 7], [(0, -1.0), (6, 0.6)]), (0, [7], [(0, -1.0)])],
)
def test_a_better_checkpoint_is_followed_by_a_state(interval, evaluated, expected, configured, monkeypatch):
    """Else a run that is killed and resumed knows of a worse best one than the file holds."""
    saved, dice, asked = [], {4: 0.5, 5: 0.4, 6: 0.6, 7: 0.1}, []

    def evaluate(selection, method, run, iteration):
        asked.append(iteration)
        selection.best = max(selection.best, dice[iteration])
        return dice[iteration]

    def save(path, **values):
        saved.append((values["iteration"], values["best"]))
        save_training_state(path, **values)

    monkeypatch.setattr(trainer.Selection, "evaluate", evaluate)
    monkeypatch.setattr(trainer, "save_training_state", save)
    trainer.train(configured(RUNS["mper in 2D"], "run", f"evaluation.validation_interval={interval}"))
    assert asked == evaluated and saved == expected


def test_a_run_is_resumed_with_its_own_text(configured, tmp_path, monkeypatch):
    """And not with what another file of that name holds by now, of which the run would have no copy to be evaluated."""
    config, run = configured(RUNS["vclipseg"], "run"), RunDirectory(tmp_path / "run")
    interrupt_at(monkeypatch, 2)
    with pytest.raises(Interrupted):
        train(config)
    run.text.unlink()
    with pytest.raises(ValueError, match=f"the run's {run.text.name} is missing"):
        train(config, run)


def test_a_state_from_before_a_key_existed_is_resumed(configured, tmp_path, monkeypatch):
    config = configured(SUPERVISED, "run")
    interrupt_at(monkeypatch, 2)
    with pytest.raises(Interrupted):
        train(config)
    run = RunDirectory(tmp_path / "run")
    tensors, metadata = read_tensors(run.training_state)
    values = json.loads(metadata[METADATA])
    assert values.pop("config/network/initialisation") == "he"
    for more in ({"config/network/of_later": 1}, {}):
        write_tensors(run.training_state, tensors, {METADATA: json.dumps({**values, **more})}, 1)
        if more:
            refused = f"checkpoint {run.training_state} belongs to another configuration: unknown key network.of_later"
            with pytest.raises(ValueError, match=f"^{refused}"):
                train(config, run)
    assert train(config, run).is_finished


def test_a_run_with_a_key_that_does_not_exist_is_named(configured, tmp_path):
    run = train(configured(SUPERVISED, "run"))
    run.config.write_text(run.config.read_text() + "of_later: 1\n")
    with pytest.raises(ValueError, match=f"^{run.config}: unknown key of_later"):
        RunDirectory.open(run.path)


def test_the_environment_of_every_session_is_kept(configured, tmp_path, monkeypatch):
    config = configured(SUPERVISED, "run")
    interrupt_at(monkeypatch, "every")
    monkeypatch.setattr("sys.orig_argv", ["python3", "first"])
    for resume in (None, RunDirectory(tmp_path / "run"), RunDirectory(tmp_path / "run")):
        with pytest.raises(Interrupted):
            train(config, resume)
        monkeypatch.setattr("sys.orig_argv", ["python3", "later"])
    environment = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert environment["command"] == "python first" and "cpu" in environment
    assert environment["precision"] == environment["resumed"][0]["precision"] == "float32"
    assert [session["command"] for session in environment["resumed"]] == ["python later", "python later"]
    assert all(session.keys() == environment.keys() - {"resumed"} for session in environment["resumed"])


def test_a_resumed_run_removes_what_a_killed_process_was_writing(tmp_path):
    left = [".last.123.safetensors", ".config.45.yaml", ".state.6"]
    kept = [".hidden", ".notes.txt", "last.1.safetensors"]
    for name in (*left, *kept):
        (tmp_path / name).touch()
    RunDirectory(tmp_path).reopen(load_config("phantom_supervised"), torch.device("cpu"))
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*kept, "environment.json"])


@pytest.mark.parametrize("content", ["{", "3"])
def test_a_damaged_environment_is_named(tmp_path, content):
    run = RunDirectory(tmp_path)
    run.environment.write_text(content)
    with pytest.raises(ValueError, match="environment.json is damaged"):
        run.read_environment()


def test_a_run_is_trained_by_one_at_a_time(configured, tmp_path, monkeypatch):
    config, run = configured(SUPERVISED, "run"), RunDirectory(tmp_path / "run")
    temporary = run.path / ".last.1.safetensors"
    refusals = []

    def resume_beside(call):
        temporary.touch()
        with pytest.raises(ValueError) as refused:
            train(config, run)
        refusals.append(str(refused.value))
        assert temporary.exists()
        if call == 1:
            signal.raise_signal(signal.SIGINT)

    count_calls(monkeypatch, TrainingSampler, "next", resume_beside)
    with pytest.raises(Interrupted):
        train(config)
    assert train(config, run).is_finished
    assert refusals == [f"{run.path} is being trained already"] * 4
    with run.locked():
        pass


def no_locks(*arguments):
    raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))


@pytest.mark.parametrize(
    ("owner", "name", "value"), [(run_directory, "fcntl", None), (fcntl, "flock", no_locks)]
)
def test_nothing_is_refused_without_locks(owner, name, value, tmp_path, monkeypatch):
    run = RunDirectory(tmp_path)
    run.config.touch()
    monkeypatch.setattr(owner, name, value)
    with run.locked(), run.locked():
        pass


def test_other_data_than_that_of_the_run_is_refused(configured, tmp_path, monkeypatch):
    config, run = configured(SUPERVISED, "run"), RunDirectory(tmp_path / "run")
    with monkeypatch.context() as patch:
        interrupt_at(patch, 1)
        with pytest.raises(Interrupted):
            train(config)
    written = DatasetDescription.load(run.dataset)
    other = dataclasses.replace(written.preprocessing, spacing=(1.0, 1.0, 2.0))
    dataclasses.replace(written, preprocessing=other).save(run.dataset)
    files = {path: path.read_bytes() for path in run.path.iterdir() if path.is_file()}
    with pytest.raises(ValueError) as refused:
        train(config, run)
    assert str(refused.value) == (
        f"{run.path} was trained on another dataset: spacing was (1.0, 1.0, 2.0) and is "
        f"{written.preprocessing.spacing} in the one given, accepted is one prepared alike"
    )
    assert {path: path.read_bytes() for path in files} == files
    run.dataset.unlink()  # as a run that is too old
    assert train(config, run).is_finished


def test_states_are_written_by_time(configured, monkeypatch):
    from semiseg.engine import trainer

    written, save = [], trainer.save_training_state

    def save_and_note(path, *, iteration, **values):
        written.append(iteration)
        save(path, iteration=iteration, **values)

    monkeypatch.setattr(trainer, "save_training_state", save_and_note)
    clock = iter(range(0, 10**6, 60))  # a minute goes by whenever it is looked at
    monkeypatch.setattr(trainer, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    train(configured(SUPERVISED, "run", "method.iterations=9", "training.checkpoint_minutes=2.5"))
    # Two looks when one is written, one else: 0 (then 60, due from 210 on), 120, 180, 240 (300, 450), 360, 420, 480.
    assert written == [0, 3, 6]


def test_a_loss_that_is_nan_names_the_iteration_and_the_checkpoint_that_is_left(
    configured, tmp_path, monkeypatch
):
    long = (*SUPERVISED[:2], [*SUPERVISED[2], "method.iterations=13"])
    expected = train(configured(long, "whole"))
    config = configured(long, "run")

    def factor(stage, batch, iteration):
        return {"factor": torch.tensor(float("nan") if iteration == 11 else 1.0)}

    def times_factor(stage, batch, inputs, losses=SupervisedStage.losses):
        return {name: loss * inputs["factor"] for name, loss in losses(stage, batch, inputs).items()}

    def interrupt(call):
        if call == 8:
            signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(SupervisedStage, "inputs", factor)
        patch.setattr(SupervisedStage, "losses", times_factor)
        count_calls(patch, TrainingSampler, "next", interrupt)
        with pytest.raises(Interrupted):
            train(config)
        run = RunDirectory(tmp_path / "run")
        with pytest.raises(FloatingPointError) as raised:
            train(config, run)
    assert str(raised.value) == (
        "the loss is nan at iteration 12 (supervised); the last good checkpoint is "
        f"{run.training_state}, of iteration 8"
    )
    assert iterations(run) == list(range(1, 12)) and not run.checkpoint().exists()
    assert_same_run(train(config, run), expected)


@pytest.mark.parametrize("every_iteration", [True, False])
def test_weights_that_are_not_finite_are_never_saved(every_iteration, configured, tmp_path, monkeypatch):
    update = SupervisedStage.update
    step = iter(range(100))

    def poison(stage):
        update(stage)
        if next(step) == 3:  # the loss of the last step was finite still
            next(stage.method.network.parameters()).data.view(-1)[0] = float("inf")

    monkeypatch.setattr(SupervisedStage, "update", poison)
    run = RunDirectory(tmp_path / "run")
    minutes = 0 if every_iteration else 5
    with pytest.raises(FloatingPointError) as raised:
        train(configured(SUPERVISED, "run", f"training.checkpoint_minutes={minutes}"))
    assert "holds NaN or infinity after iteration 4; the last good checkpoint" in str(raised.value)
    assert str(raised.value).endswith(f"of iteration {3 if every_iteration else 0}")
    assert not run.checkpoint().exists()


def test_the_second_interruption_acts_at_once():
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs start out ignoring it
    with Interruption() as interruption:
        assert interruption.signal is None
        signal.raise_signal(signal.SIGINT)
        assert interruption.signal == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_interruption_in_another_thread_notes_nothing():
    entered = []

    def enter():
        with Interruption() as interruption:
            entered.append(interruption.signal)

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert entered == [None]
