"""Pseudo-labels of two branches: eqs. 7 to 10, and the losses they are compared with, worked out by hand."""

import math

import pytest
import torch

from semiseg.models import (
    branch_weights,
    cross_pseudo_supervision,
    dynamic_pseudo_label,
    mutual_consistency,
    pseudo_label_loss,
)


def one_voxel(*probabilities: float) -> torch.Tensor:  # [1, C, 1]
    return torch.tensor(probabilities).log().reshape(1, -1, 1).requires_grad_()


def two_branches() -> tuple[torch.Tensor, torch.Tensor]:
    return one_voxel(1 / 4, 3 / 4), one_voxel(4 / 5, 1 / 5)


def test_weights_of_equations_7_and_8():
    # sigmoid(0) = 1/2 and sigmoid(ln 3) = 3/4, so w1 = e^(1/2) / (e^(1/2) + e^(1/4)) = 1 / (1 + e^(-1/4))
    # = 1 / 1.778801 = 0.562177
    loss_a = torch.tensor(0.0, requires_grad=True)
    weight_a, weight_b = branch_weights(loss_a, torch.tensor(math.log(3)))
    assert weight_a.item() == pytest.approx(0.562177, abs=1e-6)
    assert weight_b.item() == pytest.approx(0.437823, abs=1e-6)
    assert not weight_a.requires_grad and weight_a.shape == ()


def test_equal_losses_weigh_the_same():
    weight_a, weight_b = branch_weights(torch.tensor(0.3), torch.tensor(0.3))
    assert weight_a.item() == weight_b.item() == 0.5


def test_pseudo_label_of_equation_9():
    # (3/4)(1/4) + (1/4)(4/5) = 0.3875 and (3/4)(3/4) + (1/4)(1/5) = 0.6125
    logits_a, logits_b = two_branches()
    label = dynamic_pseudo_label(logits_a, logits_b, torch.tensor(0.75), torch.tensor(0.25))
    assert label.flatten().tolist() == pytest.approx([0.3875, 0.6125], abs=1e-6)
    assert not label.requires_grad and label.dtype == torch.float32


def test_loss_of_equation_10():
    # cross-entropy: a: -(ln 1/4 + ln 3/4) / 2 = ln(16/3) / 2 = 0.836988; b: ln(25/4) / 2 = 0.916291
    # Dice, 2 p P / (p^2 + P^2): a: (0.25 / 0.3125 + 0.75 / 0.8125) / 2 = 0.861538, loss 0.138462
    #                            b: (0.8 / 0.89 + 0.2 / 0.29) / 2 = 0.794266, loss 0.205734
    # sum: 0.836988 + 0.916291 + 0.138462 + 0.205734 = 2.097475
    logits_a, logits_b = two_branches()
    loss = pseudo_label_loss(logits_a, logits_b, torch.full((1, 2, 1), 0.5))
    assert loss.item() == pytest.approx(2.097475, abs=2e-5)  # Dice is smoothed by 1e-5
    loss.backward()
    assert logits_a.grad.any() and logits_b.grad.any()


def test_loss_of_equation_10_against_labels():
    # label 1: cross-entropy ln 4/3 + ln 5 = 1.897120
    # Dice, class 0 has no voxel: 1e-5 / p^2 = 0; class 1: a: 1.5 / 1.5625 = 0.96, b: 0.4 / 1.04 = 0.384615
    # losses 1 - 0.48 and 1 - 0.192308, sum 1.897120 + 0.52 + 0.807692 = 3.224812
    loss = pseudo_label_loss(*two_branches(), torch.ones(1, 1, dtype=torch.uint8))
    assert loss.item() == pytest.approx(3.224812, abs=2e-4)


def test_cross_pseudo_supervision():
    # a says 1, b says 0: -ln 1/4 - ln 1/5 = ln 20
    logits_a, logits_b = two_branches()
    loss = cross_pseudo_supervision(logits_a, logits_b)
    assert loss.item() == pytest.approx(math.log(20), abs=1e-6)
    (gradient,) = torch.autograd.grad(loss, logits_a)
    # of -ln p_0 alone: p - y = (1/4 - 1, 3/4); no gradient through the label of b
    assert gradient.flatten().tolist() == pytest.approx([-0.75, 0.75], abs=1e-6)


def test_mutual_consistency():
    # at temperature 1/2 probabilities are squared: a sharpens to (1/10, 9/10), b to (16/17, 1/17)
    # (3/4 - 1/17)^2 + (4/5 - 1/10)^2 = 0.477725 + 0.49
    logits_a, logits_b = two_branches()
    loss = mutual_consistency(logits_a, logits_b, temperature=0.5)
    assert loss.item() == pytest.approx(0.967725, abs=1e-6)
    (gradient,) = torch.autograd.grad(loss, logits_a)
    # of (p_1 - 1/17)^2 alone: 2 (3/4 - 1/17) p_0 p_1 = 0.259191 up, the same down for the other class
    assert gradient.flatten().tolist() == pytest.approx([-0.259191, 0.259191], abs=1e-6)
