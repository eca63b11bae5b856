"""Runs of a second, on the small datasets of tests/conftest.py, and what two equal runs have in common."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader

from semiseg.engine.run_directory import RunDirectory

VOLUMES = [
    "dataset.labelled=2",
    "network.filters=[2]",
    "training.patch_size=[32, 16, 16]",
    "training.labelled_batch=2",
    "training.unlabelled_batch=2",
    "evaluation.stride=[32, 16, 16]",
]
SLICES = [
    "dataset.labelled=1",
    "network.filters=[2, 2, 2, 2, 2]",
    "training.patch_size=[32, 16]",
    "training.labelled_batch=2",
    "training.unlabelled_batch=2",
    "evaluation.validation_interval=2",
]
MPER = ["method.pretraining_iterations=3", "method.iterations=4"]
# Fixture with the data, configuration, overrides.
TWO_CHANNELS = {
    f"{name} of two channels": (folder, config, ["dataset.name=own", *overrides])
    for name, folder, config, overrides in (
        ("supervised", "two_channels", "la_supervised", [*VOLUMES, "method.iterations=3"]),
        ("mper in 3D", "two_channels", "la_mper", [*VOLUMES, *MPER, "method.zero_box=[10, 10, 10]"]),
        ("mper in 2D", "slices_of_two_channels", "acdc_mper", [*SLICES, *MPER, "method.zero_box=[10, 10]"]),
        ("vclipseg", "two_channels", "la_vclipseg", [*VOLUMES, "method.text=random", "method.iterations=3"]),
    )
}


def scalars(run: RunDirectory) -> list[tuple[int, dict[str, float]]]:
    """Iteration and values of every TensorBoard record."""
    events = list(LegacyEventFileLoader(str(run.events)).Load())
    return [
        (event.step, {value.tag: value.simple_value for value in event.summary.value}) for event in events[1:]
    ]


def iterations(run: RunDirectory) -> list[int]:
    """The iterations of metrics.jsonl, in the order of the file."""
    lines = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    return [line["iteration"] for line in lines if "total" in line]


def same_tensors(path: Path, other: Path) -> bool:
    tensors, others = load_file(path), load_file(other)
    return tensors.keys() == others.keys() and all(
        torch.equal(tensor, others[name]) for name, tensor in tensors.items()
    )


def assert_same_run(run: RunDirectory, expected: RunDirectory) -> None:
    """The same files, weights and metrics, every iteration once."""
    assert {path.name for path in run.path.iterdir()} == {path.name for path in expected.path.iterdir()}
    for checkpoint in expected.path.glob("*.safetensors"):
        assert same_tensors(checkpoint, run.path / checkpoint.name), checkpoint.name
    assert run.metrics.read_text() == expected.metrics.read_text()
    assert scalars(run) == scalars(expected)
    assert iterations(run) == list(range(1, iterations(run)[-1] + 1))
    assert [iteration for iteration, values in scalars(run) if "total" in values] == iterations(run)
