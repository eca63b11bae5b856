"""The results file of a script: rows, and by which command and on which machine they were measured."""

import shlex
import sys
from pathlib import Path
from typing import Any

import torch

from semiseg.atomic import write_json
from semiseg.engine.environment import environment


def write_results(file: Path, rows: list[dict[str, Any]], **about: Any) -> None:
    """Write rows, and what else is to be known `about` all of them, as JSON."""
    command = shlex.join(["python", *sys.orig_argv[1:]])
    where = {**environment(), "threads": torch.get_num_threads()}
    write_json(file, {"rows": rows, **about, "command": command, "environment": where})
