"""`python -m semiseg.train [--config NAME_OR_PATH | --resume RUN] [section.key=value ...]`: train, then evaluate."""

from __future__ import annotations

import argparse
import subprocess
import sys
from math import prod
from pathlib import Path

from semiseg.commands import command
from semiseg.config import Config, config_names, load_config
from semiseg.engine.allocator import restart_with_tight_heap
from semiseg.engine.distributed import Processes
from semiseg.engine.interruption import Interrupted
from semiseg.engine.run_directory import RunDirectory
from semiseg.engine.trainer import choose_device, train

LARGE_BATCH = 2**20  # voxels, with which the holes in a heap take gigabytes


@command
def main(arguments: list[str] | None = None) -> None:
    """Train into a new run directory, or go on in one; the test set is opened by a process of its own, afterwards."""
    parser = argparse.ArgumentParser("python -m semiseg.train", description=__doc__)
    source = parser.add_mutually_exclusive_group()
    source.add_argument(
        "--config", default="phantom_mper", help=f"{', '.join(config_names())}, or a YAML file"
    )
    source.add_argument(
        "--resume", type=Path, metavar="RUN", help="a run directory, to go on where it stopped"
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="e.g. dataset.labelled=4 seed=1"
    )
    options = parser.parse_args(arguments)
    is_main = Processes().is_main  # the others of several processes neither print nor evaluate

    try:
        may_restart = arguments is None  # else somebody else's process runs this
        if options.resume is None:
            run = _train(load_config(options.config, options.overrides), None, may_restart)
        else:
            run = _resume(options.resume, options.overrides, may_restart)
    except Interrupted as interrupted:
        if is_main:
            print(interrupted, file=sys.stderr)
        sys.exit(interrupted.status)
    if run is None or not is_main:
        return
    evaluation = subprocess.run(
        [sys.executable, "-m", "semiseg.evaluate", "--run", str(run.path)], check=False
    )
    if evaluation.returncode:
        # Of a process that a signal ended, the status that shells give it.
        status = evaluation.returncode if evaluation.returncode > 0 else 128 - evaluation.returncode
        print(
            f"{run.path} is trained, but its evaluation ended with status {status}: "
            f"repeat it with `{run.evaluate_command}`",
            file=sys.stderr,
        )
        sys.exit(status)


def _train(config: Config, resume: RunDirectory | None, may_restart: bool) -> RunDirectory | None:
    training = config.training
    voxels = (training.labelled_batch + training.unlabelled_batch) * prod(training.patch_size)
    if may_restart and voxels >= LARGE_BATCH and choose_device(training.device).type == "cpu":
        restart_with_tight_heap()
    return train(config, resume)


def _resume(path: Path, overrides: list[str], may_restart: bool) -> RunDirectory | None:
    run, config = RunDirectory.open(path)
    if overrides:
        raise ValueError(
            f"overrides {', '.join(overrides)}: accepted with --resume are none, a run keeps its configuration"
        )
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
