"""`python -m semiseg.export`: files that other programs run, with the same probabilities as the original."""

import dataclasses
import importlib.util
import json
import os
import zipfile
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from documents import example_with
from untrained_runs import untrained_run

from semiseg import Predictor, export
from semiseg.config import parse_overrides
from semiseg.data.preprocessing import Intensity, Preprocessing
from semiseg.evaluation.evaluator import predict_case

main = export.main.__wrapped__  # without the exit status
CLASSES = ("background", "a", "b")
PREPROCESSING = Preprocessing("SPL", (1.0, 2.0, 3.0), (Intensity(clip=(-5.0, 5.0)), Intensity()))


@pytest.mark.parametrize(
    "configuration, head",
    [("phantom_mper", "mean"), ("phantom_vclipseg", "linear"), ("acdc_mper", "prototype")],
)
def test_onnx_computes_the_same_from_standard_operators(configuration, head, tmp_path):
    run = untrained_run(tmp_path / "run", configuration, PREPROCESSING, CLASSES)
    path = tmp_path / "new" / "model.onnx"
    main(["--run", str(run), "--output", str(path), f"evaluation.head={head}"])
    model = onnx.load(path)
    onnx.checker.check_model(model)
    assert {node.domain for node in model.graph.node} == {""} and not model.functions

    session = onnxruntime.InferenceSession(path)
    predictor = Predictor(run)
    for batch in (1, 5):
        windows = torch.randn(batch, 2, *predictor.config.training.patch_size)
        (probabilities,) = session.run(None, {"windows": windows.numpy()})
        expected = predictor.method.probabilities(windows, head).numpy()
        np.testing.assert_allclose(probabilities, expected, atol=5e-4)
        deviations = probabilities.std(axis=(0, *range(2, probabilities.ndim)))
        assert deviations.max() > 1e-3, "the same everywhere"

    metadata = {key: json.loads(value) for key, value in session.get_modelmeta().custom_metadata_map.items()}
    assert (
        metadata["class_names"] == list(CLASSES) and metadata["head"] == head and metadata["iteration"] == 7
    )
    assert metadata["preprocessing"]["orientation"] == "SPL"
    assert [channel["clip"] for channel in metadata["preprocessing"]["channels"]] == [[-5.0, 5.0], None]
    assert metadata["patch_size"] == list(predictor.config.training.patch_size)


def test_the_documented_program_predicts_the_same(tmp_path, monkeypatch):
    """With nothing of this library, on an image that windows do not divide."""
    run = untrained_run(tmp_path / "run", "phantom_mper", PREPROCESSING, CLASSES)
    monkeypatch.chdir(tmp_path)
    main(["--run", str(run), "--output", "model.onnx"])
    image = np.random.default_rng(0).standard_normal((2, 40, 32, 21)).astype(np.float32)
    np.save("prepared.npy", image)
    names: dict = {}
    exec(compile(example_with("onnxruntime"), "own_data.md", "exec"), names)  # noqa: S102 (our own document)
    predictor = Predictor(run)
    expected = predict_case(predictor.method, image, predictor.config, predictor.device)
    assert len(np.unique(expected)) > 1
    assert (names["classes"] != expected).mean() < 1e-3  # rounding, where two classes are equally probable


def test_pt2_computes_the_same_and_leaves_out_the_teacher(tmp_path):
    run = untrained_run(tmp_path / "run", "phantom_mper", PREPROCESSING, CLASSES)
    path = tmp_path / "model.pt2"
    main(["--run", str(run), "--output", str(path), "evaluation.head=prototype"])
    extra = {"semiseg.json": ""}
    program = torch.export.load(path, extra_files=extra)
    assert json.loads(extra["semiseg.json"])["class_names"] == list(CLASSES)
    assert not any("teacher" in name for name in program.state_dict)
    windows = torch.randn(3, 2, 32, 32, 16)
    with torch.no_grad():
        probabilities = program.module()(windows)
    expected = Predictor(run).method.probabilities(windows, "prototype")
    torch.testing.assert_close(probabilities, expected, atol=1e-5, rtol=0)


def test_a_file_says_how_it_is_used_and_nothing_of_this_machine(tmp_path):
    values = (0, 4, 9)
    run = untrained_run(tmp_path / "run", "phantom_supervised", PREPROCESSING, CLASSES, label_values=values)
    path = tmp_path / "model.pt2"
    main(["--run", str(run), "--output", str(path), "evaluation.largest_component=true"])
    extra = {"semiseg.json": ""}
    program = torch.export.load(path, extra_files=extra)
    assert program.example_inputs is None
    assert json.loads(extra["semiseg.json"]) == {
        "name": "phantom_supervised", "method": "supervised", "head": "linear", "largest_component": True, "iteration": 7,
        "class_names": list(CLASSES), "label_values": list(values),
        "preprocessing": json.loads(json.dumps(dataclasses.asdict(PREPROCESSING))),
        "patch_size": [32, 32, 16], "stride": [16, 16, 16],
    }  # fmt: skip
    with zipfile.ZipFile(path) as archive:
        content = b"".join(map(archive.read, archive.namelist()))
    assert b"semiseg_kernels" not in content and os.fsencode(Path(export.__file__).parent) not in content


def test_a_file_that_computes_something_else_is_not_left(monkeypatch, tmp_path):
    run = untrained_run(tmp_path / "run", "acdc_supervised")
    monkeypatch.setitem(
        export.FORMATS, ".pt2", (export.write_pt2, lambda path, windows: torch.zeros(3, 2, 32, 32))
    )
    with pytest.raises(ValueError, match="differ by .* accepted are 0.0001"):
        main(["--run", str(run), "--output", str(tmp_path / "model.pt2")])
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_without_onnxruntime_a_file_is_left_and_said_to_be_uncompared(monkeypatch, tmp_path, capsys):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnxruntime" else find_spec(name))
    monkeypatch.setitem(export.FORMATS, ".onnx", (lambda program, path, metadata: path.touch(), export.run_onnx))
    run = untrained_run(tmp_path / "run", "acdc_supervised")
    main(["--run", str(run), "--output", str(tmp_path / "model.onnx")])
    assert "model.onnx: not compared with the original, as onnxruntime is not installed" in capsys.readouterr().out
    assert (tmp_path / "model.onnx").is_file()


@pytest.mark.parametrize("ending", ["pt2", "onnx"])
def test_a_destination_that_cannot_be_written_is_refused_before_the_network_is_read(
    ending, monkeypatch, tmp_path
):
    monkeypatch.setattr(export, "Predictor", None)
    (tmp_path / "afile").write_text("precious")
    output = tmp_path / "afile" / f"model.{ending}"
    with pytest.raises(OSError, match=f"model.{ending}: cannot be written, as .*afile is no folder"):
        main(["--run", "run", "--output", str(output)])
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write everywhere
    with pytest.raises(OSError, match="cannot be written, as the folder .* is not writable"):
        main(["--run", "run", "--output", str(tmp_path / f"model.{ending}")])


def test_a_file_that_cannot_be_written_is_named(tmp_path):
    run = str(untrained_run(tmp_path / "run"))
    predictor = Predictor(run, ["training.device=cpu"])
    with pytest.raises(OSError, match="cannot write .*gone/model.pt2"):
        export.export(predictor, tmp_path / "gone" / "model.pt2")


def test_the_export_stays_on_the_cpu(monkeypatch, tmp_path):
    """Where the windows are, whatever device is asked for."""
    given = []
    monkeypatch.setattr(
        export, "Predictor", lambda run, overrides: given.extend(parse_overrides(overrides).items())
    )
    monkeypatch.setattr(export, "export", lambda *_: "")
    main(["--run", "run", "--output", str(tmp_path / "model.pt2"), "training.device=cuda"])
    assert given == [("training", {"device": "cpu"})]


def test_bad_arguments_are_named(monkeypatch, tmp_path):
    run = str(untrained_run(tmp_path / "run"))

    def refused(message, output, *overrides):
        with pytest.raises(ValueError, match=message):
            main(["--run", run, "--output", str(tmp_path / output), *overrides])

    refused("model.bin: accepted are files that end in .onnx or .pt2", "model.bin")
    refused("evaluation.head is 'mean', accepted here are linear", "model.pt2", "evaluation.head=mean")
    (tmp_path / "model.onnx").write_text("precious")
    refused("exists already", "model.onnx")
    assert (tmp_path / "model.onnx").read_text() == "precious"
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnx" else find_spec(name))
    refused(r"onnx is not installed; pip install -e '.\[export\]'", "other.onnx")
