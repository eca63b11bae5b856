"""The examples in README.md and docs/ run as they stand."""

import dataclasses
import importlib.util
import re
import sys

import pytest
from documents import ROOT, blocks

from semiseg.config import load_config
from semiseg.engine.trainer import train
from semiseg.methods import METHODS


@pytest.mark.parametrize("document", ["README.md", "docs/operations.md"])
def test_examples_of_the_operations_run(document):
    examples = blocks(document, "python")
    assert examples
    for example in examples:
        exec(compile(example, document, "exec"), {})  # noqa: S102 (our own documents)


def test_the_method_of_adding_a_method_trains(tmp_path, monkeypatch):
    (code,), (configuration,) = (blocks("docs/adding_a_method.md", kind) for kind in ("python", "yaml"))
    (tmp_path / "mean_teacher.py").write_text(code)
    spec = importlib.util.spec_from_file_location("mean_teacher", tmp_path / "mean_teacher.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "mean_teacher", module)
    spec.loader.exec_module(module)
    monkeypatch.setitem(METHODS, "mean_teacher", module.MeanTeacher)

    (tmp_path / "phantom_mean_teacher.yaml").write_text(configuration)
    overrides = [
        "method.iterations=2",
        "training.patch_size=[32,32,32]",
        "training.labelled_batch=2",
        "training.unlabelled_batch=2",
        f"output={tmp_path / 'run'}",
    ]
    run = train(load_config(str(tmp_path / "phantom_mean_teacher.yaml"), overrides))
    assert '"consistency"' in run.metrics.read_text()
    assert run.checkpoint().is_file()


@pytest.mark.parametrize("name", METHODS)
def test_every_switch_of_a_method_is_explained(name):
    text = (ROOT / "docs" / "methods.md").read_text()
    keys = {field.name for field in dataclasses.fields(METHODS[name].Options)} - {"name"}
    assert {key for key in keys if f"`{key}`" not in text} == set()


def test_links_between_documents_lead_somewhere():
    for document in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        for target, anchor in re.findall(r"\]\(([^)#]*)#?([^)]*)\)", document.read_text()):
            if "://" in target:
                continue
            linked = document.parent / target if target else document
            assert linked.exists(), f"{document.name}: {target}"
            if anchor:
                titles = re.findall(r"^#+ (.*)$", linked.read_text(), re.MULTILINE)
                anchors = [re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles]
                assert anchor in anchors, f"{document.name}: {target}#{anchor}"
