"""Weights per region, and the ramp-up."""

import math

import pytest
import torch

from semiseg.models import region_weighted_loss, regions_by_image, sigmoid_ramp_up
from semiseg_kernels import dice_ce


def test_region_weights():
    logits = torch.randn(2, 3, 6, 5, requires_grad=True)
    labels = torch.randint(0, 3, (2, 6, 5), dtype=torch.uint8)
    regions = torch.randint(0, 2, (2, 6, 5), dtype=torch.uint8)
    losses = dice_ce(logits, labels, regions=regions, num_regions=2)
    loss = region_weighted_loss(losses, torch.tensor([1.0, 0.5]))
    assert loss.shape == ()
    expected = (losses.ce[0] + losses.dice[0]) / 2 + 0.5 * (losses.ce[1] + losses.dice[1]) / 2
    torch.testing.assert_close(loss, expected)
    (gradient,) = torch.autograd.grad(loss, logits)
    (without_second,) = torch.autograd.grad(
        region_weighted_loss(
            dice_ce(logits, labels, regions=regions, num_regions=2), torch.tensor([1.0, 0.0])
        ),
        logits,
    )
    second = (regions == 1)[:, None].expand_as(logits)
    assert gradient[second].any() and not without_second[second].any()


def test_one_region():
    losses = dice_ce(torch.randn(1, 2, 4), torch.randint(0, 2, (1, 4)))
    torch.testing.assert_close(
        region_weighted_loss(losses, torch.ones(1)), (losses.ce[0] + losses.dice[0]) / 2
    )


def test_regions_by_image():
    """The loss over them is the mean of each image's own."""
    logits, labels = torch.randn(3, 2, 40), torch.randint(0, 2, (3, 40))
    regions, weights = torch.randint(0, 2, (3, 40), dtype=torch.uint8), torch.tensor([1.0, 0.5])
    numbered, shared = regions_by_image(regions, weights)
    assert numbered.dtype == torch.uint8 and numbered.unique().tolist() == [0, 1, 2, 3, 4, 5]
    loss = region_weighted_loss(dice_ce(logits, labels, regions=numbered, num_regions=6), shared)
    alone = [
        region_weighted_loss(dice_ce(*image, regions=r, num_regions=2), weights)
        for *image, r in zip(logits.split(1), labels.split(1), regions.split(1), strict=True)
    ]
    torch.testing.assert_close(loss, torch.stack(alone).mean())


def test_one_weight_per_region():
    losses = dice_ce(torch.randn(1, 2, 4), torch.randint(0, 2, (1, 4)))
    with pytest.raises(ValueError, match="region_weights has shape"):
        region_weighted_loss(losses, torch.ones(2))


def test_ramp_up():
    assert sigmoid_ramp_up(0, 6000) == math.exp(-5)
    assert sigmoid_ramp_up(3000, 6000) == pytest.approx(math.exp(-1.25))
    assert sigmoid_ramp_up(6000, 6000) == sigmoid_ramp_up(20000, 6000) == 1.0
    assert sigmoid_ramp_up(0, 0) == 1.0
    assert sigmoid_ramp_up(449, 6000, step=150) == sigmoid_ramp_up(300, 6000) < sigmoid_ramp_up(450, 6000, step=150)
    values = [sigmoid_ramp_up(t, 100) for t in range(101)]
    assert values == sorted(set(values))
