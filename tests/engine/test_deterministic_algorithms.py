import pytest
import torch
from small_runs import VOLUMES

from semiseg.config import load_config
from semiseg.engine.determinism import deterministic_algorithms
from semiseg.engine.trainer import train
from semiseg.methods.supervised import SupervisedStage


def flags():
    return (
        torch.are_deterministic_algorithms_enabled(),
        torch.backends.cudnn.benchmark,
        torch.utils.deterministic.fill_uninitialized_memory,
    )


def test_algorithms_are_chosen_inside_and_as_before_outside():
    before = flags()
    with deterministic_algorithms(True):
        assert flags() == (True, False, False)
    assert flags() == before
    with pytest.raises(KeyError), deterministic_algorithms(False):
        assert flags() == (before[0], True, before[2])
        raise KeyError
    assert flags() == before


def test_a_run_is_deterministic_where_that_is_asked_for(left_atrium, monkeypatch):
    enabled = []
    note = lambda stage: enabled.append(torch.are_deterministic_algorithms_enabled())
    monkeypatch.setattr(SupervisedStage, "update", note)
    options = ["method.iterations=1", f"dataset.root={left_atrium}", f"output={left_atrium / 'run'}"]
    train(load_config("la_supervised", [*VOLUMES, *options, "training.deterministic=true"]))
    assert enabled == [True]


@pytest.mark.gpu
def test_a_linear_upsampling_has_the_same_gradient_each_time():
    x = torch.randn(2, 16, 20, 20, 20, device="cuda", requires_grad=True)
    with deterministic_algorithms(True):
        upsampled = torch.nn.functional.interpolate(x, scale_factor=2, mode="trilinear")
        gradients = [torch.autograd.grad(upsampled.square().sum(), x, retain_graph=True)[0] for _ in range(3)]
    assert all(torch.equal(gradient, gradients[0]) for gradient in gradients)
