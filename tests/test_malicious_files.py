"""Files that would run code if they were believed: one line says which, and the code never runs."""

import pickle
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from challenge_files import write_nifti
from untrained_runs import untrained_run

from semiseg import evaluate, predict, report, train
from semiseg.config import load_config
from semiseg.data.phantom import Phantom
from semiseg.engine.run_directory import RunDirectory
from semiseg.text import clip_text, file_text


class Payload:
    """Pickled, it is a call that makes a folder."""

    def __init__(self, executed: Path):
        self.executed = executed

    def __reduce__(self):
        return Path.mkdir, (self.executed,)


@pytest.fixture
def executed(tmp_path):
    """The folder that a payload makes; at the end of the test there is none."""
    path = tmp_path / "executed"
    yield path
    assert not path.exists()


def write_pickle(path, executed):
    path.write_bytes(pickle.dumps(Payload(executed)))


def write_torch(path, executed):
    torch.save({"text": Payload(executed)}, path)


def write_legacy_torch(path, executed):
    torch.save({"text": Payload(executed)}, path, _use_new_zipfile_serialization=False)


def write_npz(path, executed):
    with open(path, "wb") as file:
        np.savez(file, text=np.array([Payload(executed)], dtype=object))


def write_yaml(path, executed):
    path.write_text(f"method: !!python/object/apply:os.mkdir ['{executed}']\n")


WRITERS = (write_pickle, write_torch, write_legacy_torch, write_npz)


def test_the_payload_would_run(tmp_path):
    for number, write in enumerate(WRITERS):
        executed, path = tmp_path / f"executed{number}", tmp_path / "file"
        write(path, executed)
        if write is write_npz:
            np.load(path, allow_pickle=True)["text"]
        elif write is write_pickle:
            pickle.loads(path.read_bytes())
        else:
            torch.load(path, weights_only=False)
        assert executed.is_dir()


def refused(main, arguments, name, capsys):
    """The command ends with status 2 and one line that names the file."""
    with pytest.raises(SystemExit) as end:
        main(arguments)
    error = capsys.readouterr().err
    assert end.value.code == 2 and re.fullmatch(rf"error: .*{re.escape(name)}.*\n", error), error


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = untrained_run(
        tmp_path_factory.mktemp("run") / "run", "phantom_vclipseg", Phantom.preprocessing, Phantom.class_names
    )
    run = RunDirectory(folder)
    assert run.text.is_file()
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.fixture
def run(trained, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    for name, content in trained.items():
        (folder / name).write_bytes(content)
    return RunDirectory(folder)


@pytest.mark.parametrize("write", [*WRITERS, write_yaml])
@pytest.mark.parametrize("name", ["config.yaml", "dataset.json", "text.safetensors", "last.safetensors"])
def test_prediction(run, name, write, executed, tmp_path, capsys):
    write(run.path / name, executed)
    scan = tmp_path / "scan.nii.gz"
    write_nifti(scan, np.zeros((8, 8, 8), np.float32), np.eye(4))
    output = tmp_path / "mask.nii.gz"
    refused(
        predict.main, ["--run", str(run.path), "--input", str(scan), "--output", str(output)], name, capsys
    )
    assert not output.exists()


@pytest.mark.parametrize("name", ["config.yaml", "text.safetensors", "last.safetensors"])
def test_evaluation(run, name, executed, capsys):
    write_torch(run.path / name, executed)
    refused(evaluate.main, ["--run", str(run.path)], name, capsys)


@pytest.mark.parametrize("name", ["config.yaml", "training_state.safetensors"])
def test_resuming(run, name, executed, capsys):
    run.training_state.touch()
    write_torch(run.path / name, executed)
    refused(train.main, ["--resume", str(run.path)], name, capsys)


@pytest.mark.parametrize("name", ["config.yaml", "results.json"])
def test_report(run, name, executed, capsys):
    write_torch(run.path / name, executed)
    refused(report.main, [str(run.path)], name, capsys)


@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize("ending", ["npz", "safetensors", "pt", "pth"])
def test_text_embeddings(ending, write, executed, tmp_path):
    path = tmp_path / f"text.{ending}"
    write(path, executed)
    with pytest.raises(ValueError, match=f"^method.text_file {path}[: ].") as error:
        file_text(path, 2)
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize("write", WRITERS)
def test_text_model(write, executed, tmp_path):
    """A folder for method.clip_model whose weights are in PyTorch's format."""
    transformers = pytest.importorskip("transformers")
    transformers.CLIPTextConfig(hidden_size=16, num_hidden_layers=1).save_pretrained(tmp_path)
    write(tmp_path / "pytorch_model.bin", executed)
    with pytest.raises(ValueError, match="method.text=clip cannot load") as error:
        clip_text(str(tmp_path), ["a pixel"])
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize("write", [*WRITERS, write_yaml])
def test_configuration(write, executed, tmp_path):
    path = tmp_path / "own.yaml"
    write(path, executed)
    with pytest.raises(ValueError, match=f"^{path} .*") as error:
        load_config(str(path), [])
    assert len(str(error.value).splitlines()) == 1


def test_override(executed):
    with pytest.raises(ValueError, match="the value is not YAML"):
        load_config("phantom_mper", [f"seed=!!python/object/apply:os.mkdir ['{executed}']"])
