"""Captured and replayed work is the work that was captured: on the CPU by a recorder, marked `gpu` by CUDA itself."""

import pytest
import recorded_graph
import torch
from test_fast_step import METHODS_AND_SIZES, batch_of

from semiseg.config import load_config
from semiseg.engine.cuda_graph import WARM_UP, CudaGraph
from semiseg.engine.determinism import deterministic_algorithms
from semiseg.engine.distributed import Processes
from semiseg.engine.trainer import build_method, build_optimiser
from semiseg.engine.training_step import TrainingStep, check_cuda_graph, is_cuda_graph
from semiseg.methods import METHODS
from semiseg.methods.method import Batch

CPU = torch.device("cpu")
STEPS = WARM_UP + 4
RAMPING = ("training.precision=float32", "method.ramp_up_iterations=5", "method.learning_rate_step=5")


def train(name, device, cuda_graph):
    """Losses of some steps, and everything the method holds after them; λ moves in each, the learning rate once."""
    configuration, *overrides = METHODS_AND_SIZES[name]
    ramping = RAMPING[0::2] if name == "supervised" else RAMPING
    config = load_config(
        configuration,
        [*overrides, *ramping, f"training.cuda_graph={str(cuda_graph).lower()}", "preset=paper"],
    )
    num_classes = 4 if "slices" in name else 3
    torch.manual_seed(0)
    text = METHODS[config.method.name].text(config, [f"class {c}" for c in range(num_classes)])
    method = build_method(config, num_classes, device, text)
    stage = method.stages(torch.Generator().manual_seed(0))[-1]
    if method.prototypes is not None:
        method.prototypes.copy_(torch.randn(method.prototypes.shape))
    step = TrainingStep(config, method, stage, build_optimiser(config, method), device, Processes())
    torch.manual_seed(2)  # of dropout
    data = batch_of(config, num_classes, seed=1)
    losses = []
    for iteration in range(STEPS):
        tensors = (tensor.roll(iteration, -1).to(device) for tensor in vars(data).values())
        losses.append(step(Batch(*tensors), iteration))
    return losses, method.state_dict()


@pytest.mark.parametrize("name", METHODS_AND_SIZES)
def test_replayed_steps_are_those_without_a_graph(name, monkeypatch):
    expected = train(name, CPU, cuda_graph=False)
    recorded_graph.install(monkeypatch)
    actual = train(name, CPU, cuda_graph=True)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@pytest.mark.gpu
@pytest.mark.parametrize("name", METHODS_AND_SIZES)
def test_steps_of_a_cuda_graph_are_those_without(name):
    with deterministic_algorithms(True):
        expected, actual = (train(name, torch.device("cuda"), cuda_graph) for cuda_graph in (False, True))
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def test_results_are_new_tensors_and_what_is_given_is_left(monkeypatch):
    recorded_graph.install(monkeypatch)
    graph = CudaGraph(CPU)
    xs = [torch.full((3,), float(number)) for number in range(WARM_UP + 3)]
    results = [graph(lambda given: {"double": given["x"] * 2}, {"x": x}, None)["double"] for x in xs]
    for number, (x, result) in enumerate(zip(xs, results, strict=True)):
        assert x.tolist() == [number] * 3 and result.tolist() == [2 * number] * 3


def test_another_constant_is_captured_anew(monkeypatch):
    recorded_graph.install(monkeypatch)
    captures, factor = [], 1.0

    def scaled(given):
        captures.append(factor)
        return {"scaled": given["x"] * factor}

    graph, x = CudaGraph(CPU), torch.ones(2)
    results = []
    for factor in [1.0] * (WARM_UP + 2) + [0.5] * 2 + [1.0]:
        results.append(graph(scaled, {"x": x}, factor)["scaled"].tolist())
    assert results == [[1, 1]] * (WARM_UP + 2) + [[0.5, 0.5]] * 2 + [[1, 1]]
    assert captures == [1.0] * (WARM_UP + 1) + [0.5, 1.0]


def test_a_capture_that_reads_a_value_is_refused(monkeypatch):
    recorded_graph.install(monkeypatch)

    def reading(given):
        return {"x": given["x"] * given["x"].sum().item()}

    graph, x = CudaGraph(CPU), torch.ones(2)
    for _ in range(WARM_UP):
        graph(reading, {"x": x}, None)
    with pytest.raises(RuntimeError, match="aten::_local_scalar_dense in a capture"):
        graph(reading, {"x": x}, None)


def test_a_step_is_a_graph_where_one_process_trains_on_a_gpu_with_kernels(monkeypatch):
    kernels = "semiseg.engine.training_step.has_gpu_kernels"
    monkeypatch.setattr(kernels, lambda device: device.type == "cuda")
    gpu, one = torch.device("cuda"), Processes()
    unasked, asked, refused = (
        load_config("phantom_supervised", [f"training.cuda_graph={value}"])
        for value in ("null", "true", "false")
    )
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    two = Processes()
    assert is_cuda_graph(unasked, gpu, one) and is_cuda_graph(asked, gpu, one)
    assert not is_cuda_graph(refused, gpu, one)
    assert not is_cuda_graph(unasked, CPU, one) and not is_cuda_graph(unasked, gpu, two)
    check_cuda_graph(asked, gpu, one)
    check_cuda_graph(unasked, CPU, two)
    with pytest.raises(ValueError, match=r"training\.cuda_graph is true on cpu with 1 processes"):
        check_cuda_graph(asked, CPU, one)
    with pytest.raises(ValueError, match="on cuda with 2 processes, accepted is one process on a GPU"):
        check_cuda_graph(asked, gpu, two)
    # The reference of the largest components waits for the GPU, which a capture refuses.
    monkeypatch.setattr(kernels, lambda device: False)
    assert not is_cuda_graph(unasked, gpu, one)
    with pytest.raises(ValueError, match="on cuda with 1 processes, .* with a cuda or triton backend$"):
        check_cuda_graph(asked, gpu, one)
