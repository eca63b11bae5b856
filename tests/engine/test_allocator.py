import json
import os
import subprocess
import sys

import nibabel
import numpy as np
import pytest
from untrained_runs import untrained_run

from semiseg import evaluate, predict, train
from semiseg.engine.allocator import HUGE_PAGES, TIGHT, keep_heap

SCRIPT = """
import json, os, sys
from semiseg.engine.allocator import restart_with_tuned_heap
with open("starts", "a") as file: file.write("x")
restart_with_tuned_heap()
print(json.dumps([os.environ.get("GLIBC_TUNABLES"), sys.argv[1:]]))
"""


@pytest.fixture
def restarted(tmp_path):
    """Runs a command that starts itself again: its environment, its arguments, and how often it started."""
    if not keep_heap():
        pytest.skip("the C library is not glibc")
    script = tmp_path / "command.py"
    script.write_text(SCRIPT)

    def run(**environment):
        left = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"}
        done = subprocess.run(
            [sys.executable, script, "a b", "--c=1"], cwd=tmp_path, env=left | environment,
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        return *json.loads(done.stdout), len((tmp_path / "starts").read_text())

    return run


def test_a_command_starts_once_more_with_its_arguments(restarted):
    assert restarted() == (f"{TIGHT}:{HUGE_PAGES}", ["a b", "--c=1"], 2)


def test_what_the_user_has_set_stays(restarted):
    other = "glibc.malloc.perturb=0"
    assert restarted(GLIBC_TUNABLES=other) == (f"{other}:{TIGHT}:{HUGE_PAGES}", ["a b", "--c=1"], 2)


def test_what_the_user_says_of_them_holds(restarted):
    own = "glibc.malloc.tcache_count=3"
    assert restarted(GLIBC_TUNABLES=own) == (f"{own}:{HUGE_PAGES}", ["a b", "--c=1"], 2)


def test_a_user_who_says_all_starts_once(restarted):
    own = "glibc.malloc.hugetlb=0:glibc.malloc.tcache_count=3"
    assert restarted(GLIBC_TUNABLES=own) == (own, ["a b", "--c=1"], 1)


@pytest.mark.parametrize(
    ("arguments", "overrides", "restarts"),
    [
        (None, ["training.patch_size=[112,112,80]"], True),
        (None, [], False),
        (["--config", "phantom_mper", "training.patch_size=[112,112,80]"], None, False),
    ],
    ids=["large", "small", "in another's process"],
)
def test_large_batches_restart_the_command(monkeypatch, arguments, overrides, restarts):
    """Before anything is trained, and only as a command of its own."""
    happened = []
    monkeypatch.setattr(train, "restart_with_tuned_heap", lambda: happened.append("restart"))
    monkeypatch.setattr(train, "train", lambda config, resume: happened.append("train"))
    monkeypatch.setattr(sys, "argv", ["train", *(overrides or [])])
    train.main(arguments)
    assert happened == (["restart", "train"] if restarts else ["train"])


@pytest.mark.parametrize(
    ("module", "options", "work"),
    [
        (evaluate, [], "evaluate"),
        (predict, ["--input", "scan.nii", "--output", "mask.nii"], "Predictor"),
    ],
    ids=["evaluate", "predict"],
)
@pytest.mark.parametrize("own", [True, False], ids=["own process", "another's process"])
def test_whole_images_restart_the_command(module, options, work, own, tmp_path, monkeypatch):
    class Worked(Exception):
        pass

    happened = []

    def end(*_):
        happened.append(work)
        raise Worked

    monkeypatch.chdir(tmp_path)
    nibabel.save(nibabel.Nifti1Image(np.zeros((4, 4, 4), np.int16), np.eye(4)), "scan.nii")
    arguments = ["--run", str(untrained_run(tmp_path / "run")), *options]
    monkeypatch.setattr(module, "restart_with_tuned_heap", lambda: happened.append("restart"))
    monkeypatch.setattr(module, work, end)
    monkeypatch.setattr(sys, "argv", [work, *arguments])
    with pytest.raises(Worked):
        module.main(None if own else arguments)
    assert happened == (["restart", work] if own else [work])
