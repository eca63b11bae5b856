"""Evaluation of whole cases: which windows, which class, and a network that is trained on afterwards."""

import numpy as np
import pytest
import torch

from semiseg.config import load_config
from semiseg.data import open_dataset
from semiseg.data.phantom import Phantom
from semiseg.engine.trainer import build_method
from semiseg.evaluation import metrics as metrics_module
from semiseg.evaluation.evaluator import (
    class_map,
    evaluate_cases,
    evaluation_batch,
    predict_case,
    probability_slabs,
    split_dice,
    validation_config,
)
from semiseg.evaluation.metrics import case_metrics, summarise
from semiseg.models.convolution import Convolution3d
from semiseg.models.folding import fold_batch_norm

CPU = torch.device("cpu")
SLICES = ["training.patch_size=[32, 32]", "network.filters=[4, 4, 4, 4, 4]"]
PHANTOM = ["training.patch_size=[32,32,32]", "evaluation.stride=[32,32,16]", "network.filters=[4]"]


def test_the_first_of_the_most_probable_classes():
    probabilities = torch.tensor([[0.2, 0.4, 0.1], [0.5, 0.4, 0.2], [0.3, 0.2, 0.7]])
    assert class_map(probabilities).tolist() == [1, 0, 2]
    assert class_map(probabilities).dtype == torch.uint8


def test_windows_during_training():
    final = ["evaluation.stride=[18,18,4]"]
    half = validation_config(load_config("la_mper", final))
    assert half.evaluation.stride == (56, 56, 40)
    chosen = load_config("la_mper", [*final, "evaluation.validation_stride=[60,30,10]"])
    assert validation_config(chosen).evaluation.stride == (60, 30, 10)
    assert chosen.evaluation.stride == (18, 18, 4)
    slices = load_config("acdc_mper")
    assert validation_config(slices) == slices


@pytest.mark.parametrize(
    ("configuration", "overrides", "batch"),
    [
        ("la_mper", [], 4),
        ("acdc_mper", [], 64),
        ("la_mper", ["training.patch_size=[160, 160, 176]"], 1),
        ("la_mper", ["evaluation.batch=5"], 5),
    ],
)
def test_windows_of_four_million_voxels_go_through_the_network_together(configuration, overrides, batch):
    assert evaluation_batch(load_config(configuration, overrides)) == batch


def test_weights_are_transformed_once(convolution_calls):
    options = ["training.precision=float32", "training.channels_last=true", "network.filters=[16]"]
    config = load_config("phantom_supervised", [*PHANTOM, *options, "evaluation.batch=1"])
    case = next(iter(open_dataset("phantom", None, 0).evaluation_cases("test")))
    method = fold_batch_norm(build_method(config, 3, CPU).eval())
    for _ in range(2):
        predict_case(method, case.image, config, CPU)
    launches = [name for name, options in convolution_calls if options.get("matrices")]
    transforms, convolutions = (launches.count(f"convolution_{name}") for name in ("matrices", "forward"))
    assert transforms == sum(isinstance(layer, Convolution3d) for layer in method.modules())
    assert convolutions > transforms and convolutions % transforms == 0


@pytest.mark.parametrize(
    ("configuration", "overrides"),
    [
        ("phantom_supervised", PHANTOM),
        ("acdc_supervised", SLICES),
        ("acdc_supervised", [*SLICES, "evaluation.stride=[16, 16]"]),
    ],
)
def test_a_network_that_adds_up_channels_sees_their_sum(configuration, overrides):
    """With the same weights for every channel."""
    config = load_config(configuration, [*overrides, "training.precision=float32"])
    torch.manual_seed(0)
    of_sum = build_method(config, 3, CPU).eval()
    of_channels = build_method(config, 3, CPU, channels=2).eval()
    weights = of_sum.state_dict()
    first = "network.encoder.stages.0.0.weight"
    of_channels.load_state_dict(weights | {first: weights[first].expand(-1, 2, *[-1] * (weights[first].ndim - 2))})
    image = np.random.default_rng(0).standard_normal((2, 5, 40, 36)).astype(np.float32)
    found, expected = (
        torch.cat([slab.clone() for slab in probability_slabs(method, given, config, CPU)], dim=1)
        for method, given in ((of_channels, image), (of_sum, image.sum(axis=0, keepdims=True)))
    )
    assert found.shape == (3, 5, 40, 36) and expected.std() > 0.01
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("precision", ["bfloat16", "float32"])
def test_predictions_are_in_the_configured_precision(precision):
    config = load_config("phantom_supervised", [*PHANTOM, f"training.precision={precision}"])
    case = next(iter(open_dataset("phantom", None, 0).evaluation_cases("test")))
    method, autocasts = build_method(config, 3, CPU).eval(), []
    method.network.register_forward_hook(lambda *_: autocasts.append(torch.is_autocast_enabled("cpu")))
    predict_case(method, case.image, config, CPU)
    assert autocasts and set(autocasts) == {precision == "bfloat16"}


def test_cases_are_those_of_the_network_in_evaluation_mode():
    config = load_config("phantom_supervised", [*PHANTOM, "training.precision=float32"])
    dataset = open_dataset("phantom", None, 0)
    torch.manual_seed(0)
    method = build_method(config, len(dataset.class_names), CPU).train()
    before = {key: value.clone() for key, value in method.state_dict().items()}
    case, prediction, metrics = next(iter(evaluate_cases(method, dataset, "test", config, CPU)))
    assert all(module.training for module in method.modules())
    assert all(torch.equal(value, before[key]) for key, value in method.state_dict().items())
    expected = predict_case(method.eval(), case.image, config, CPU)
    assert expected.any() and not expected.all()
    assert (prediction != expected).mean() < 1e-3  # rounding, where two classes are equally probable
    assert metrics == case_metrics(prediction, case.label, dataset.class_names, case.spacing)


def test_dice_of_a_split_is_that_of_its_summary_without_distances(monkeypatch):
    config = load_config("phantom_supervised", [*PHANTOM, "training.precision=float32"])
    dataset = Phantom(validation=3)
    torch.manual_seed(0)
    given = build_method(config, len(dataset.class_names), CPU), dataset, "validation", config, CPU
    summary = summarise({case.name: metrics for case, _, metrics in evaluate_cases(*given)})
    assert summary["mean"]["dice"]["sd"] > 0
    monkeypatch.setattr(metrics_module, "KDTree", None)
    assert split_dice(*given) == summary["mean"]["dice"]["mean"]
