"""Images of several channels, from their files to the evaluation."""

import json

import numpy as np
import pytest
import torch
from h5_files import write_own
from safetensors.torch import load_file
from small_runs import TWO_CHANNELS
from test_resume import interrupt_at

from semiseg import evaluate
from semiseg.config import load_config
from semiseg.engine.cost import method_cost
from semiseg.engine.interruption import Interrupted
from semiseg.engine.run_directory import RunDirectory
from semiseg.engine.trainer import build_method, train
from semiseg.evaluation import pictures
from semiseg.evaluation.pictures import prediction_pictures
from semiseg.text import random_text

SUPERVISED = TWO_CHANNELS["supervised of two channels"][2]


@pytest.mark.parametrize("name", TWO_CHANNELS)
def test_training_and_evaluation(name, request, tmp_path, monkeypatch):
    folder, configuration, overrides = TWO_CHANNELS[name]
    root, output = request.getfixturevalue(folder), tmp_path / "run"
    run = train(load_config(configuration, [*overrides, f"dataset.root={root}", f"output={output}"]))
    assert {tensor.shape[1] for key, tensor in load_file(run.checkpoint()).items()
            if key.endswith("encoder.stages.0.0.weight")} == {2}  # fmt: skip
    totals = [json.loads(line).get("total", 0) for line in run.metrics.read_text().splitlines()]
    assert np.isfinite(totals).all()
    monkeypatch.setattr(pictures, "VOXELS", 60)  # the map of many takes most of the time
    evaluate.main(["--run", str(output)])
    results = json.loads(run.results.read_text())
    assert list(results["cases"]) == ["test"] and results["classes"] == ["background", "core", "rim"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in prediction_pictures(run))


@pytest.mark.parametrize("channels", [1, 3])
def test_data_of_other_channels_are_refused(channels, two_channels, tmp_path, monkeypatch):
    """Whether a run is resumed or evaluated, before a weight is loaded."""
    run, other = RunDirectory(tmp_path / "run"), write_own(tmp_path / "other", 3, channels)
    config, with_other = (
        load_config("la_supervised", [*SUPERVISED, f"dataset.root={root}", f"output={run.path}"])
        for root in (two_channels, other)
    )
    with monkeypatch.context() as patched, pytest.raises(Interrupted):
        interrupt_at(patched, 2)
        train(config)
    with pytest.raises(ValueError, match=r"was trained on another dataset: number of channels was 2 and is") as resuming:
        train(with_other, run)
    assert train(config, run).is_finished
    with pytest.raises(ValueError, match=r"was trained on another dataset: number of channels was 2 and is") as evaluating:
        evaluate.evaluate(with_other, run)
    assert "\n" not in str(resuming.value) + str(evaluating.value)


@pytest.mark.parametrize(("described", "held"), [(1, 2), (2, 1), (3, 2)])
def test_files_of_other_channels_than_described_are_refused(described, held, tmp_path):
    root = write_own(tmp_path / "data", 3, held)
    (root / "dataset.json").write_text((write_own(tmp_path / "other", 3, described) / "dataset.json").read_text())
    config = load_config("la_supervised", [*SUPERVISED, f"dataset.root={root}", f"output={tmp_path / 'run'}"])
    with pytest.raises(ValueError, match=r"cases/\w+\.h5: 'image' has shape .*; expected") as raised:
        train(config)
    assert "\n" not in str(raised.value) and not (tmp_path / "run").exists()


@pytest.mark.parametrize("configuration", ["phantom_supervised", "acdc_supervised", "phantom_vclipseg", "two networks"])
def test_every_network_reads_all_channels(configuration):
    overrides = []
    if configuration == "two networks":
        configuration = "phantom_vclipseg"
        overrides = ["method.branches=two_networks", "method.voxel_prompt=false", "method.text_consistency=false"]
    method = build_method(load_config(configuration, overrides), 3, torch.device("cpu"), random_text(3, 512, 0), 4)
    first = [layer for key, layer in method.named_modules() if key.endswith("encoder.stages.0.0")]
    assert first and all(layer.in_channels == 4 for layer in first)


def test_the_cost_of_channels():
    """Each takes 2 x 27 multiply-adds a voxel in the first layer, and as many parameters."""
    costs = []
    for channels in (1, 4):
        config = load_config("phantom_supervised", ["network.filters=[2]"])
        method = build_method(config, 3, torch.device("cpu"), channels=channels)
        costs.append(method_cost(method, (32, 32, 16), channels)["inference"])
    assert costs[1]["parameters"] - costs[0]["parameters"] == 3 * 2 * 27
    assert costs[1]["multiply_adds"] - costs[0]["multiply_adds"] == 3 * 2 * 27 * 32 * 32 * 16
