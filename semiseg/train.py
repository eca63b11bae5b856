"""`python -m semiseg.train [--config NAME_OR_PATH | --resume RUN] [section.key=value ...]`: train, then evaluate."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from math import prod
from pathlib import Path

from semiseg.commands import command
from semiseg.config import Config, load_config, overridden
from semiseg.config_files import config_names
from semiseg.engine.allocator import restart_with_tuned_heap, tuned_environment
from semiseg.engine.distributed import Processes
from semiseg.engine.interruption import Interrupted
from semiseg.engine.run_directory import EVALUATED_WITH, RESUMED_WITH, RunDirectory
from semiseg.engine.trainer import choose_device, train

LARGE_BATCH = 2**20  # voxels, with which the holes in a heap take gigabytes


@command
def main(arguments: list[str] | None = None) -> None:
    """Train into a new run directory, or resume a run; the test set is opened by a process of its own, afterwards."""
    parser = argparse.ArgumentParser("python -m semiseg.train", description=__doc__)
    source = parser.add_mutually_exclusive_group()
    source.add_argument(
        "--config", default="phantom_mper", help=f"{', '.join(config_names())}, or a YAML file"
    )
    source.add_argument(
        "--resume", type=Path, metavar="RUN", help="a run directory, to resume where it stopped"
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="e.g. dataset.labelled=4 seed=1"
    )
    options = parser.parse_intermixed_args(arguments)  # overrides before and after --config
    is_main = Processes().is_main  # the others of several processes neither print nor evaluate
    may_restart = arguments is None  # else somebody else's process runs this
    overrides = options.overrides
    try:
        if options.resume is None:
            run = _train(load_config(options.config, overrides), None, may_restart)
            overrides = []  # which are the run's own
        else:
            run = _resume(options.resume, overrides, may_restart)
    except Interrupted as interrupted:
        if is_main:
            print(interrupted, file=sys.stderr)
        sys.exit(interrupted.status)
    if run is None or not is_main:
        return
    again = [override for override in overrides if override.partition("=")[0] in EVALUATED_WITH]
    _evaluate(run, again, may_restart)


def _evaluate(run: RunDirectory, overrides: list[str], may_replace: bool) -> None:
    """Evaluate in this process's place, so that it has its memory, its GPU and its signals, or else in another."""
    command = [sys.executable, "-m", "semiseg.evaluate", "--run", str(run.path), *overrides]
    if may_replace and os.name == "posix":
        print(f"{run.path} is trained; `{run.evaluate_command(overrides)}` repeats its evaluation", flush=True)
        sys.stderr.flush()
        os.execve(sys.executable, command, tuned_environment())
    evaluation = subprocess.run(command, check=False)
    if evaluation.returncode:
        # Of a process that a signal ended, the status that shells give it.
        status = evaluation.returncode if evaluation.returncode > 0 else 128 - evaluation.returncode
        print(
            f"{run.path} is trained, but its evaluation ended with status {status}: "
            f"repeat it with `{run.evaluate_command(overrides)}`",
            file=sys.stderr,
        )
        sys.exit(status)


def _train(config: Config, resume: RunDirectory | None, may_restart: bool) -> RunDirectory | None:
    training = config.training
    voxels = (training.labelled_batch + training.unlabelled_batch) * prod(training.patch_size)
    if may_restart and voxels >= LARGE_BATCH and choose_device(training.device).type == "cpu":
        restart_with_tuned_heap()
    return train(config, resume)


def _resume(path: Path, overrides: list[str], may_restart: bool) -> RunDirectory | None:
    run, config = RunDirectory.open(path)
    config = overridden(config, overrides, RESUMED_WITH)
    if run.is_finished:
        print(f"{run.path} is finished; evaluating it", flush=True)
        return run
    if not run.training_state.is_file():
        raise FileNotFoundError(
            f"{run.path} holds no {run.training_state.name}: it ended before its first step; train anew"
        )
    return _train(config, run, may_restart)


if __name__ == "__main__":
    main()
