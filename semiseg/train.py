"""`python -m semiseg.train [--config NAME_OR_PATH] [section.key=value ...]`: train a method, then evaluate it."""

from __future__ import annotations

import argparse
import subprocess
import sys

from semiseg.commands import command
from semiseg.config import config_names, load_config
from semiseg.engine.trainer import train


@command
def main(arguments: list[str] | None = None) -> None:
    """Train into a new run directory; the test set is opened by a process of its own, afterwards."""
    parser = argparse.ArgumentParser("python -m semiseg.train", description=__doc__)
    parser.add_argument(
        "--config", default="phantom_mper", help=f"{', '.join(config_names())}, or a YAML file"
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="e.g. dataset.labelled=4 seed=1"
    )
    options = parser.parse_args(arguments)
    config = load_config(options.config, options.overrides)

    run = train(config)
    evaluation = subprocess.run(
        [sys.executable, "-m", "semiseg.evaluate", "--run", str(run.path)], check=False
    )
    if evaluation.returncode:
        sys.exit(evaluation.returncode)


if __name__ == "__main__":
    main()
