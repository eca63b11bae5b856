"""What goes wrong outside the program: it is killed, the disk is full, a file is damaged. Nothing is lost by it."""

import contextlib
import itertools
import math
import multiprocessing
import os
import random
import shlex
import shutil
import signal
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace

import h5py
import numpy as np
import pytest
import torch
import yaml
from small_runs import SLICES, VOLUMES, assert_same_run, iterations
from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader

from semiseg import evaluate, train
from semiseg.config import load_config
from semiseg.engine import trainer
from semiseg.engine.checkpoint import save_checkpoint
from semiseg.engine.metrics_log import MetricsLog
from semiseg.engine.run_directory import RunDirectory

SHORT = ["method.pretraining_iterations=5", "method.iterations=9", "evaluation.validation_interval=7"]
MPER = [*SLICES, "method.zero_box=[10, 10]", "method.pretraining_iterations=15", "method.iterations=25"]
COMMANDS = {"train": train.main, "evaluate": evaluate.main}
LATER = ["torch._dynamo", "sklearn.cluster", "semiseg.evaluation.figures"]  # what they import on the way

# Children are forked from a process that has imported everything and computed nothing, so that they start at once.
processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(["semiseg.train", "semiseg.evaluate", *LATER])


def say_what_would_run(command: list[str], check: bool) -> SimpleNamespace:
    print(shlex.join(command[1:]), flush=True)
    return SimpleNamespace(returncode=0)


def run_command(verb: str, arguments: list[str], output: str) -> None:
    """In a child: what `python -m semiseg.<verb>` does, with stdout and stderr in one file."""
    torch.set_num_threads(1)
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    train.subprocess = SimpleNamespace(run=say_what_would_run)  # in this child alone
    COMMANDS[verb](arguments)


def modified(folder: Path) -> int:
    """Nanoseconds; 0 where there is no such folder yet."""
    return folder.stat().st_mtime_ns if folder.is_dir() else 0


class Command:
    """A command under way in a process of its own. After training it only says how it would evaluate."""

    def __init__(self, output: Path, verb: str, *arguments: str):
        self.output = output
        self.process = processes.Process(target=run_command, args=(verb, list(arguments), str(output)))
        self.process.start()

    def wait(self) -> int:
        """Its exit status, or less the signal that ended it."""
        self.process.join(120)
        assert self.process.exitcode is not None
        return self.process.exitcode

    def changes_seen(self, folder: Path, most: float = math.inf) -> int:
        """How often files come into a folder, are renamed or go, until it ends or they are `most`."""
        seen, last = 0, modified(folder)
        while seen < most and self.process.is_alive():
            now = modified(folder)
            seen, last = seen + (now != last), now
            time.sleep(0.0005)
        return seen

    def killed_at(self, folder: Path, change: int) -> bool:
        """Kill it at that change of a folder, counted from 1, unless it ends before."""
        if self.changes_seen(folder, change) == change:
            self.process.kill()
        return self.wait() == -signal.SIGKILL

    def send_when_there_is(self, path: Path, number: signal.Signals) -> None:
        self.wait_for(path)
        os.kill(self.process.pid, number)

    def wait_for(self, path: Path) -> None:
        while not path.exists():
            assert self.process.is_alive(), self.output.read_text()
            time.sleep(0.001)

    def lines(self) -> list[str]:
        """What it said in the end, without progress bars."""
        text = self.output.read_text()
        assert "Traceback" not in text, text
        return [line.rpartition("\r")[2] for line in text.splitlines()]

    def refusal(self) -> str:
        """The one line of a command that must fail."""
        assert self.wait() == 2, self.output.read_text()
        *others, line = self.lines()
        assert line.startswith("error: ") and not [other for other in others if "error" in other.lower()]
        return line.removeprefix("error: ")


@pytest.fixture
def command(tmp_path_factory):
    outputs = tmp_path_factory.mktemp("output")
    numbers = itertools.count()
    return lambda *arguments: Command(outputs / str(next(numbers)), *arguments)


@pytest.fixture
def mper(acdc):
    """Arguments of a run of both stages, with validation."""
    return ["--config", "acdc_mper", *MPER, f"dataset.root={acdc}"]


@pytest.fixture
def unfinished(mper, command, tmp_path):
    """A run stopped by Ctrl-C."""
    run = RunDirectory(tmp_path / "unfinished")
    session = command("train", *mper, f"output={run.path}")
    session.send_when_there_is(run.training_state, signal.SIGINT)
    assert session.wait() == 130
    return run


@pytest.fixture
def small_disk(tmp_path):
    """A folder on a file system of four megabytes."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = shutil.which("mount")
    if (
        mount is None
        or subprocess.run(
            [mount, "-t", "tmpfs", "-o", "size=4m", "tmpfs", folder], check=False, capture_output=True
        ).returncode
    ):
        pytest.skip("mounting a tmpfs is not permitted here")
    yield folder
    subprocess.run(["umount", folder], check=True)


def fill(folder: Path) -> Path:
    """Leave no room on a file system."""
    filler = folder / "filler"
    with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    return filler


def half_written(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.name.startswith(".")]


@pytest.mark.parametrize("times", [5, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_where_files_change(times, mper, command, tmp_path):
    """At any of the changes: a file begun, put in its place or deleted."""
    moments = random.Random(times)
    arguments = [*mper, *SHORT, "training.checkpoint_minutes=0"]  # a state after every iteration
    expected = RunDirectory(tmp_path / "whole")
    session = command("train", *arguments, f"output={expected.path}")
    changes = session.changes_seen(expected.path)
    assert session.wait() == 0 and changes > 14  # iterations

    kills, number = 0, 0
    while kills < times:
        number += 1
        run = RunDirectory(tmp_path / f"run{number}")
        session = command("train", *arguments, f"output={run.path}")
        while kills < times and session.killed_at(run.path, moments.randint(1, changes)):
            if not run.training_state.is_file() and not run.is_finished:
                break  # before its first step: another one is started
            kills += 1
            session = command("train", "--resume", str(run.path))
        else:
            assert session.wait() == 0, session.output.read_text()
            assert_same_run(run, expected)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopped_by_a_signal_and_resumed_to_the_end(number, mper, command, tmp_path):
    run = RunDirectory(tmp_path / "run")
    session = command("train", *mper, f"output={run.path}")
    session.send_when_there_is(run.training_state, number)
    assert session.wait() == 128 + number
    said = session.lines()[-1]
    assert said.startswith(f"stopped by {number.name} after iteration ")
    assert said.endswith(f" of 40: resume it with `python -m semiseg.train --resume {run.path}`")
    assert not half_written(run.path)

    refused = command("evaluate", "--run", str(run.path)).refusal()
    assert refused == f"{run.path} is unfinished: resume it with `{run.resume_command}`"
    assert command("train", "--resume", str(run.path)).wait() == 0
    assert iterations(run) == list(range(1, 41))


def test_a_finished_run_goes_on_to_its_evaluation(left_atrium, command, tmp_path):
    overrides = [*VOLUMES, "method.iterations=1", f"dataset.root={left_atrium}", f"output={tmp_path / 'run'}"]
    run = trainer.train(load_config("la_supervised", overrides))
    weights, metrics = run.checkpoint().read_bytes(), run.metrics.read_text()
    session = command("train", "--resume", str(run.path))
    assert session.wait() == 0
    said = [f"{run.path} is finished; evaluating it", f"-m semiseg.evaluate --run {run.path}"]
    assert session.lines() == said
    assert run.checkpoint().read_bytes() == weights and run.metrics.read_text() == metrics


def truncate(run):
    run.training_state.write_bytes(run.training_state.read_bytes()[:-100])


def replace_by_a_model(run):
    save_checkpoint(run.training_state, torch.nn.Linear(1, 1), iteration=3)


def change_the_configuration(run):
    run.config.write_text(run.config.read_text().replace("learning_rate: 0.01", "learning_rate: 0.02"))


def change_the_data(run):
    names = Path(yaml.safe_load(run.config.read_text())["dataset"]["root"]) / "train_slices.list"
    names.write_text("".join(names.read_text().splitlines(keepends=True)[:-1]))


def cut_the_metrics(run):
    run.metrics.write_bytes(b"")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncate, "checkpoint {state} is damaged"),
        (lambda run: run.training_state.write_bytes(b"{}"), "checkpoint {state} is damaged"),
        (lambda run: run.training_state.unlink(), "it ended before its first step; train anew"),
        (replace_by_a_model, "checkpoint {state} holds no training state"),
        (
            change_the_configuration,
            "checkpoint {state} belongs to another configuration: training.learning_rate was 0.01 and is 0.02 here",
        ),
        (change_the_data, "and the dataset given has none there, accepted are the same cases in the same order"),
        (cut_the_metrics, "metrics.jsonl is damaged"),
        (lambda run: run.config.unlink(), "is no run directory: config.yaml is missing"),
    ],
)
def test_a_state_that_does_not_belong_to_the_run_is_refused(damage, message, unfinished, command):
    if damage is cut_the_metrics:
        resume_until_something_is_logged(command, unfinished)
    damage(unfinished)
    files = {path: path.read_bytes() for path in unfinished.path.iterdir() if path.is_file()}
    refused = command("train", "--resume", str(unfinished.path)).refusal()
    assert message.format(state=unfinished.training_state) in refused
    files.pop(unfinished.environment)
    assert {path: path.read_bytes() for path in files} == files and not half_written(unfinished.path)


def resume_until_something_is_logged(command, run):
    while not run.metrics.stat().st_size:
        session = command("train", "--resume", str(run.path))
        session.wait_for(run.checkpoint("validation"))
        os.kill(session.process.pid, signal.SIGINT)
        assert session.wait() == 130


def test_a_run_keeps_its_configuration(unfinished, command):
    refused = command("train", "--resume", str(unfinished.path), "seed=3").refusal()
    assert refused == (
        "override 'seed=3', accepted for a run that exists are dataset.root, training.device, "
        "training.checkpoint_minutes"
    )


def test_a_run_is_resumed_with_its_data_elsewhere(mper, acdc, command, tmp_path):
    """As of a job that is given a folder of its own every time."""
    scratch, run = tmp_path / "scratch", RunDirectory(tmp_path / "run")
    scratch.symlink_to(acdc)
    session = command("train", *mper, f"dataset.root={scratch}", f"output={run.path}")
    session.send_when_there_is(run.training_state, signal.SIGINT)
    assert session.wait() == 130
    scratch.unlink()
    session = command("train", "--resume", str(run.path), f"dataset.root={acdc}")
    assert session.wait() == 0
    assert session.lines()[-1] == f"-m semiseg.evaluate --run {run.path} dataset.root={acdc}"
    assert command("evaluate", "--run", str(run.path), f"dataset.root={acdc}").wait() == 0


def test_a_full_disk_while_training(mper, command, small_disk, tmp_path):
    arguments = [*mper, "training.checkpoint_minutes=0"]
    expected, run = RunDirectory(tmp_path / "whole"), RunDirectory(small_disk / "run")
    assert command("train", *arguments, f"output={expected.path}").wait() == 0

    session = command("train", *arguments, f"output={run.path}")
    session.wait_for(run.checkpoint("validation"))
    filler = fill(small_disk)
    refused = session.refusal()
    assert refused.startswith(f"cannot write {run.path}") and "No space left on device" in refused
    assert not half_written(run.path)
    assert iterations(run)[-1] < 40  # every line is whole
    filler.unlink()
    assert command("train", "--resume", str(run.path)).wait() == 0
    assert_same_run(run, expected)

    filler = fill(small_disk)
    before = {path for path in run.path.rglob("*")}
    assert command("evaluate", "--run", str(run.path)).refusal().startswith(f"cannot write {run.path}")
    assert not run.results.exists() and {path for path in run.path.rglob("*")} - before <= {run.overlays}
    new = command("train", *arguments, f"output={small_disk / 'new'}").refusal()
    assert new.startswith(f"cannot write {small_disk / 'new'}")
    assert not [path for path in (small_disk / "new").rglob("*") if path.is_file()]


def test_metrics_on_a_full_disk_stay_whole(small_disk):
    run = RunDirectory(small_disk / "run")
    run.path.mkdir()
    with MetricsLog(run) as log, pytest.raises(OSError, match=f"cannot write {run.path}.*No space left"):
        for iteration in itertools.count(1):
            log.add(iteration, "supervised", {"total": 0.5, "padding" * 100: 0.0})
            if iteration == 20:
                fill(small_disk)
    written = iterations(run)
    events = [event.step for event in LegacyEventFileLoader(str(run.events)).Load()][1:]
    assert len(written) >= 20 and written == list(range(1, written[-1] + 1))
    assert events in (written, written[:-1])  # the line of an iteration is written before its event


def with_arrays(path: Path, change) -> None:
    with h5py.File(path, "r+") as file:
        arrays = {key: file[key][()] for key in file}
        change(arrays)
        for key, array in arrays.items():
            file[key][...] = array


def truncate_case(path):
    path.write_bytes(path.read_bytes()[:-200])


def put_nan(path):
    def change(arrays):
        arrays["image"][1, 2, 3] = np.nan

    with_arrays(path, change)


def empty_label(path):
    with_arrays(path, lambda arrays: arrays["label"].fill(0))


METHODS = {
    "la_supervised": ["method.iterations=2"],
    "la_mper": ["method.zero_box=[10, 10, 10]", "method.pretraining_iterations=2", "method.iterations=2"],
    "la_vclipseg": ["method.text=random", "method.iterations=2"],
}


@pytest.mark.parametrize("config", METHODS)
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncate_case, "mri_norm2.h5: cannot be read as HDF5"),
        (put_nan, "mri_norm2.h5: 'image' holds NaN or infinity"),
        (empty_label, "the 2 labelled cases hold no voxel of the class 'left atrium'"),
    ],
)
def test_bad_labelled_cases_are_refused_before_training(config, damage, message, left_atrium, command):
    for name in ("CASE3", "CASE1"):
        damage(left_atrium / "2018LA_Seg_Training Set" / name / "mri_norm2.h5")
    output = left_atrium / "run"
    refused = command(
        "train",
        "--config",
        config,
        *VOLUMES,
        *METHODS[config],
        f"dataset.root={left_atrium}",
        f"output={output}",
    ).refusal()
    assert message in refused and not output.exists()


@pytest.mark.parametrize("config", METHODS)
def test_one_labelled_case_may_be_all_background(config, left_atrium):
    empty_label(left_atrium / "2018LA_Seg_Training Set" / "CASE3" / "mri_norm2.h5")
    overrides = [*VOLUMES, *METHODS[config], f"dataset.root={left_atrium}", f"output={left_atrium / 'run'}"]
    run = trainer.train(load_config(config, overrides))
    assert run.is_finished and iterations(run)  # which are finite, or the log would have raised


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda run: run.checkpoint().write_bytes(run.checkpoint().read_bytes()[:-100]), "is damaged"),
        (
            lambda run: run.config.write_text(run.config.read_text().replace("  - 2\n", "  - 3\n", 1)),
            "does not fit the configuration",
        ),
        (lambda run: run.checkpoint().unlink(), "is unfinished: resume it with"),
    ],
)
def test_evaluation_refuses_a_checkpoint_that_is_not_of_the_run(damage, message, left_atrium, command):
    config = load_config(
        "la_supervised",
        [*VOLUMES, "method.iterations=1", f"dataset.root={left_atrium}", f"output={left_atrium / 'run'}"],
    )
    run = RunDirectory.create(config, torch.device("cpu"))
    save_checkpoint(run.checkpoint(), trainer.build_method(config, 2, torch.device("cpu")), iteration=1)
    damage(run)
    assert message in command("evaluate", "--run", str(run.path)).refusal()
    assert not run.results.exists()
