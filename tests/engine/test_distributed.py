"""Training on two processes, through gloo, against training on one with the same batches."""

import functools
import json
import os
import signal
import socket
import subprocess
import sys
import time
from datetime import timedelta
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file
from torch import multiprocessing, nn
from torch.distributed import TCPStore

from semiseg.config import load_config
from semiseg.data.phantom import Phantom
from semiseg.engine import distributed, trainer
from semiseg.engine.distributed import Processes, gradients
from semiseg.engine.interruption import Interrupted
from semiseg.engine.run_directory import RunDirectory
from semiseg.engine.trainer import build_method
from semiseg.models.batch_norm import BatchNormReLU
from semiseg.models.vnet import VNetEncoder

PROCESSES = 2
TINY = [
    "training.patch_size=[32, 32, 16]",
    "evaluation.stride=[32, 32, 16]",
    "network.filters=[2]",
    "network.dropout=[0.0]",  # its masks differ between the processes
    "training.device=cpu",
]
MPER = [*TINY, "method.pretraining_iterations=2", "method.zero_box=[20, 20, 10]", "method.iterations=3"]
RUNS = {
    "supervised": ("phantom_supervised", [*TINY, "method.iterations=3"]),
    "mper": ("phantom_mper", [*MPER, "method.ramp_up_iterations=0"]),
    # Smaller weights would magnify what order of summation changes.
    "mper_released": (
        "phantom_mper",
        [
            *MPER,
            "preset=released",
            "network.initialisation=he",
            "method.ramp_up_iterations=0",
            "method.dice_squared=false",
            "method.dice_per_image=true",
        ],
    ),
    "vclipseg": ("phantom_vclipseg", [*TINY, "method.iterations=3", "method.ramp_up_iterations=0"]),
    "mutual": ("phantom_vclipseg", [*TINY, "method.iterations=3", "method.pseudo_label=mutual"]),
}
STOPPED = "mper"  # this one is also stopped on the way, and resumed


def free_port():
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        return bound.getsockname()[1]


def environment(rank, port):
    """What torchrun would set."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(PROCESSES),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
    }


def build_in_float64(*arguments):
    """A method that computes so exactly that steps do not magnify what order of summation changes."""
    method = build_method(*arguments).double()
    for module in method.modules():
        if isinstance(module, VNetEncoder):
            module.register_forward_pre_hook(lambda _, given: (given[0].double(),))
    return method


@functools.cache
def few_cases(labelled):
    return Phantom(training=8).training_cases(labelled)


def few_phantoms(config):
    dataset = Phantom(training=8)
    dataset.training_cases = few_cases
    return dataset


def train_run(name, folder, resume=False):
    config, overrides = RUNS[name]
    path = folder / name
    with (
        mock.patch.object(trainer, "build_method", build_in_float64),
        mock.patch.object(torch.Tensor, "float", torch.Tensor.double),
        mock.patch.object(trainer, "open_configured_dataset", few_phantoms),
        mock.patch.object(trainer.Selection, "due", lambda *_: False),
    ):
        return trainer.train(
            load_config(config, [*overrides, f"output={path}"]), RunDirectory(path) if resume else None
        )


def stop_and_resume(rank, ports, folder):
    """The second process gets a signal during the third iteration of five."""
    average, calls = Processes.average, []

    def interrupted_average(self, tensors):
        average(self, tensors)
        calls.append(1)
        if rank == 1 and len(calls) == 3:
            signal.raise_signal(signal.SIGTERM)

    os.environ.update(environment(rank, ports[0]))
    with mock.patch.object(Processes, "average", interrupted_average), pytest.raises(Interrupted):
        train_run(STOPPED, folder)
    assert len(calls) == 3
    os.environ.update(environment(rank, ports[1]))
    train_run(STOPPED, folder, resume=True)


def normalised(images):
    """A batch normalisation's outputs, gradients and buffers after two steps on images."""
    layer = nn.Sequential(BatchNormReLU(3))
    with torch.no_grad():
        layer[0].weight.copy_(torch.tensor([0.5, 1.0, 2.0]))
    processes = Processes()
    images = images[processes.rank :: processes.count].requires_grad_()
    layer(images + 100)
    output = layer(images)
    loss = (output * images.detach().flip(2)).mean()
    loss.backward()
    mine = gradients(layer)
    processes.average([*(parameter for parameter in mine), loss.detach()])
    names = {name: tensor.detach() for name, tensor in layer.state_dict().items()}
    of_parameters = {name: parameter.grad for name, parameter in layer.named_parameters()}
    return {"output": output.detach(), "by_image": images.grad, "loss": loss.detach()}, names, of_parameters


def images():
    return torch.randn(4, 3, 5, 6, 7, generator=torch.Generator().manual_seed(0)) * 3 + 1


def process(rank, ports, folder):
    torch.set_num_threads(1)
    for name, port in zip(RUNS, ports, strict=False):
        os.environ.update(environment(rank, port))
        assert (train_run(name, folder) is None) == (rank > 0)
    stop_and_resume(rank, ports[-3:-1], folder / "resumed")
    os.environ.update(environment(rank, ports[-1]))
    processes = Processes()
    with processes.joined(torch.device("cpu")):
        torch.save((normalised(images()), processes.any(rank == 1)), folder / f"{rank}.pt")


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """The folder of the runs that two processes trained, and of what else they measured."""
    folder = tmp_path_factory.mktemp("two")
    ports = [free_port() for _ in range(len(RUNS) + 3)]
    multiprocessing.spawn(process, (ports, folder), nprocs=PROCESSES)
    return folder


def steps(run):
    lines = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    return [line for line in lines if "total" in line]


@pytest.mark.parametrize("name", RUNS)
def test_losses_weights_and_prototypes_are_those_of_the_joined_batch(two_processes, name, tmp_path):
    train_run(name, tmp_path)
    one, two = RunDirectory(tmp_path / name), RunDirectory(two_processes / name)
    assert len(steps(one)) >= 3
    for alone, joined in zip(steps(one), steps(two), strict=True):
        assert joined.pop("stage") == alone.pop("stage")
        assert joined == pytest.approx(alone, rel=1e-7)
    expected, trained = (load_file(run.checkpoint()) for run in (one, two))
    torch.testing.assert_close(trained, expected, rtol=1e-6, atol=1e-7)


def test_stopped_by_one_process_and_resumed_by_all(two_processes):
    through, resumed = (RunDirectory(two_processes / path / STOPPED) for path in (".", "resumed"))
    assert steps(resumed) == steps(through)
    torch.testing.assert_close(
        load_file(resumed.checkpoint()), load_file(through.checkpoint()), rtol=0, atol=0
    )


def test_batch_normalisation_is_that_of_the_joined_batch(two_processes):
    tensors, state, by_parameter = normalised(images())
    for rank in range(PROCESSES):
        (own, own_state, own_by_parameter), _ = torch.load(two_processes / f"{rank}.pt", weights_only=True)
        share = slice(rank, None, PROCESSES)
        torch.testing.assert_close(own["output"], tensors["output"][share], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(own["by_image"] / PROCESSES, tensors["by_image"][share])
        torch.testing.assert_close(own["loss"], tensors["loss"])
        torch.testing.assert_close(own_state, state)
        torch.testing.assert_close(own_by_parameter, by_parameter)


def test_a_flag_of_one_process_is_seen_by_all(two_processes):
    assert [torch.load(two_processes / f"{rank}.pt", weights_only=True)[1] for rank in range(PROCESSES)] == [
        True
    ] * PROCESSES


def hang(rank, port):
    """The second process is away for longer than a step may take."""
    os.environ.update(environment(rank, port))
    processes = Processes()
    with (
        mock.patch.object(distributed, "STEP_TIMEOUT", timedelta(seconds=2)),
        pytest.raises(ConnectionError),
        processes.joined(torch.device("cpu")),
    ):
        if rank == 1:
            time.sleep(6)
        processes.any(False)


def test_a_process_that_hangs_between_steps_ends_the_job():
    multiprocessing.spawn(hang, (free_port(),), nprocs=PROCESSES)


def join_late(rank, port, late):
    """One process reads its data for longer than a step may take."""
    os.environ.update(environment(rank, port))
    processes = Processes()
    with mock.patch.object(distributed, "STEP_TIMEOUT", timedelta(seconds=2)):
        if rank == late:
            time.sleep(6)
        with processes.joined(torch.device("cpu")):
            assert processes.any(rank == late)


@pytest.mark.parametrize("late", range(PROCESSES))
def test_processes_wait_for_one_that_still_reads_its_data(late):
    multiprocessing.spawn(join_late, (free_port(), late), nprocs=PROCESSES)


def test_processes_of_torchrun_wait_for_one_that_still_reads_its_data(monkeypatch):
    """They meet where torchrun listens."""
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    torchrun = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    multiprocessing.spawn(join_late, (torchrun.port, 1), nprocs=PROCESSES)


@pytest.mark.slow
def test_torchrun_writes_one_run(tmp_path):
    line = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        str(PROCESSES),
        "--master-port",
    ]
    line += [str(free_port()), "-m", "semiseg.train", "--config", "phantom_supervised", *TINY]
    result = subprocess.run(
        [*line, "method.iterations=2"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["phantom_supervised"]
    assert result.stdout.count("run directory") == 1
    run = RunDirectory(tmp_path / "runs" / "phantom_supervised")
    assert [line["iteration"] for line in steps(run)] == [1, 2]
    assert len(json.loads(run.results.read_text())["cases"]) == 12


def test_the_job_ends_when_one_process_dies(tmp_path):
    port = free_port()
    overrides = [*TINY, "method.iterations=100000", "output=run"]
    line = [sys.executable, "-m", "semiseg.train", "--config", "phantom_supervised", *overrides]
    started = [
        subprocess.Popen(
            line,
            cwd=tmp_path,
            env={**os.environ, **environment(rank, port)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(PROCESSES)
    ]
    try:
        metrics = tmp_path / "run" / "metrics.jsonl"
        wait_for(lambda: metrics.is_file() and metrics.stat().st_size > 0, started)
        started[1].send_signal(signal.SIGKILL)
        _, stderr = started[0].communicate(timeout=120)
    finally:
        for each in started:
            each.kill()
            each.wait()
    assert started[0].returncode == 2
    errors = [line for line in stderr.splitlines() if line.startswith("error:")]
    assert len(errors) == 1 and "process 0 of 2 lost another" in errors[0], stderr
    assert "Traceback" not in stderr


def wait_for(condition, started, seconds=120):
    for _ in range(seconds * 10):
        if condition():
            return
        assert all(each.poll() is None for each in started), "a process ended too early"
        time.sleep(0.1)
    raise TimeoutError


@pytest.mark.parametrize("name, processes, multiple", [("phantom_mper", 4, 8), ("phantom_supervised", 3, 3)])
def test_processes_that_do_not_divide_the_batch(monkeypatch, name, processes, multiple):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    with pytest.raises(ValueError, match=f"labelled_batch is 4, accepted .* multiples of {multiple}"):
        trainer.train(load_config(name))


def test_a_gpu_of_its_own(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    chosen = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setenv("WORLD_SIZE", "3")
    for rank in range(3):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("LOCAL_RANK", str(rank))
        processes = Processes()
        assert processes.own_device(torch.device("cpu")) == torch.device("cpu")
        with pytest.raises(ValueError, match="training.device is cuda:1"):
            processes.own_device(torch.device("cuda:1"))
        if rank < 2:
            assert processes.own_device(torch.device("cuda")) == torch.device("cuda", rank)
        else:
            with pytest.raises(ValueError, match="no GPU of its own"):
                processes.own_device(torch.device("cuda"))
    assert chosen == [0, 1]


def test_dropout_differs_between_processes_and_iterations(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    masks = {}
    for rank in range(3):
        monkeypatch.setenv("RANK", str(rank))
        for seed in (5, 6, 2**63):
            Processes().seed(seed)
            masks[rank, seed] = torch.dropout(torch.ones(64), 0.5, True).tolist()
    assert len({tuple(mask) for mask in masks.values()}) == 9
    torch.manual_seed(5)
    assert masks[0, 5] == torch.dropout(torch.ones(64), 0.5, True).tolist()


def test_one_process_is_left_alone(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    processes, value = Processes(), torch.tensor([3.0])
    with processes.joined(torch.device("cpu")):
        processes.average([value])
        processes.wait()
    assert processes.is_main and value.item() == 3 and processes.any(True) and not processes.any(False)
