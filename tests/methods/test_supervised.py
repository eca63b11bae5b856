"""The baseline's loss against the formula written out."""

import pytest
import torch
import torch.nn.functional as F

from semiseg.config import load_config
from semiseg.engine.trainer import build_method
from semiseg.methods.method import Batch

CLASSES, PATCH = 3, (32, 16, 16)


def test_the_loss_is_the_mean_of_cross_entropy_and_dice_on_labelled_images():
    config = load_config("phantom_supervised", ["network.filters=[2]", "network.dropout=[0.0]"])
    method = build_method(config, CLASSES, torch.device("cpu"))
    (stage,) = method.stages(torch.Generator())
    assert not stage.uses_unlabelled
    image, label = torch.randn(2, 1, *PATCH), torch.randint(CLASSES, (2, *PATCH), dtype=torch.uint8)
    losses = stage.losses(Batch(image, label, torch.empty(0, 1, *PATCH)), {})

    probability = method.network(image)[0].double().softmax(1)
    truth = F.one_hot(label.long(), CLASSES).movedim(-1, 1).double()
    cross_entropy = -(truth * probability.log()).sum(1).mean()
    overlap, sizes = (x.sum((0, 2, 3, 4)) for x in (truth * probability, truth**2 + probability**2))
    dice = 1 - ((2 * overlap + 1e-5) / (sizes + 1e-5)).mean()
    assert set(losses) == {"total"}
    assert losses["total"].item() == pytest.approx((cross_entropy + dice).item() / 2, rel=1e-5)
