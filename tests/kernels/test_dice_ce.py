import math

import pytest
import torch
from comparison import DTYPES, LAYOUTS, UNCHECKED, assert_accurate, in_layout

from semiseg_kernels import dice_ce, reference
from semiseg_kernels.checks import INTEGER_DTYPES

# B, *S, C
CASES = {
    "3d": (2, (5, 7, 9), 2),
    "2d": (3, (17, 19), 4),
    "empty": (2, (0, 4, 4), 3),
    "no batch": (0, (4, 4), 3),
    "one voxel": (1, (1, 1, 1), 4),
    "one class": (2, (63,), 1),
    "63 voxels": (1, (7, 9), 17),
    "many chunks": (1, (65537,), 4),
    "many classes": (1, (67,), 104),
    "512 classes": (1, (33,), 512),
}


def named(logits, target, **options):
    return dice_ce(logits, target, **options)._asdict()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_accuracy(kernel, case, dtype, layout):
    batch, spatial, num_classes = CASES[case]
    logits = in_layout(3 * torch.randn(batch, num_classes, *spatial), layout).to(dtype)
    labels = torch.randint(-1, num_classes, (batch, *spatial), dtype=torch.int16)
    regions = torch.randint(0, 3, (batch, *spatial), dtype=torch.uint8)
    scale = float(logits.abs().max()) if logits.numel() else 1
    options = {"regions": regions, "num_regions": 3}
    assert_accurate(kernel, lambda x: named(x, labels), logits, scale, unit=False)
    assert_accurate(
        kernel, lambda x: named(x, labels, temperature=0.5, **options), logits, 2 * scale, unit=False
    )


@pytest.mark.parametrize("target_layout", LAYOUTS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("target_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_accuracy_of_soft_targets(kernel, dtype, target_dtype, layout, target_layout):
    logits = in_layout(3 * torch.randn(2, 3, 11, 13), layout).to(dtype)
    target = in_layout(torch.randn(2, 3, 11, 13).softmax(1), target_layout).to(target_dtype)
    regions = torch.randint(0, 2, (2, 11, 13), dtype=torch.bool)
    scale = float(logits.abs().max())
    assert_accurate(kernel, lambda x: named(x, target), logits, scale, unit=False)
    assert_accurate(kernel, lambda x: named(x, target, regions=regions), logits, scale, unit=False)


@pytest.mark.parametrize(
    "options", [{"squared": False}, {"include_background": False}, {"squared": False, "include_background": False}], ids=str
)
@pytest.mark.parametrize("num_classes", [2, 3, 17])
@pytest.mark.parametrize("soft", [False, True])
def test_accuracy_of_other_dice(kernel, soft, num_classes, options):
    logits = 3 * torch.randn(2, num_classes, 11, 13)
    target = torch.randn(logits.shape).softmax(1) if soft else torch.randint(-1, num_classes, (2, 11, 13))
    options = {**options, "regions": torch.randint(0, 3, (2, 11, 13), dtype=torch.uint8), "num_regions": 3}
    assert_accurate(
        kernel, lambda x: named(x, target, **options), logits, float(logits.abs().max()), unit=False
    )


def test_large_logits(kernel):
    logits = 300 * torch.randn(2, 5, 77)
    labels = torch.randint(0, 5, (2, 77))
    assert_accurate(kernel, lambda x: named(x, labels), logits, float(logits.abs().max()), unit=False)


def test_worked_by_hand(backend):
    logits = torch.tensor([[0.0, math.log(3.0)], [0.0, 0.0]]).T.unsqueeze(0)  # p = (1/4, 3/4) and (1/2, 1/2)
    ce, dice = dice_ce(logits, torch.tensor([[1, 0]]))
    torch.testing.assert_close(ce, torch.tensor([(math.log(4 / 3) + math.log(2)) / 2]))
    first = 2 * 0.5 / (1 / 16 + 1 / 4 + 1)
    second = 2 * 0.75 / (9 / 16 + 1 / 4 + 1)
    torch.testing.assert_close(dice, torch.tensor([1 - (first + second) / 2]), rtol=0, atol=1e-5)


def test_other_dice_worked_by_hand(backend):
    logits = torch.tensor([[0.0, math.log(3.0)], [0.0, 0.0]]).T.unsqueeze(0)  # p = (1/4, 3/4) and (1/2, 1/2)
    target = torch.tensor([[1, 0]])
    first, second = 2 * 0.5 / (1 / 4 + 1 / 2 + 1), 2 * 0.75 / (3 / 4 + 1 / 2 + 1)
    expected = torch.tensor([1 - (first + second) / 2])
    torch.testing.assert_close(dice_ce(logits, target, squared=False).dice, expected, rtol=0, atol=1e-5)
    alone = dice_ce(logits, target, squared=False, include_background=False)
    torch.testing.assert_close(alone.dice, torch.tensor([1 - second]), rtol=0, atol=1e-5)
    torch.testing.assert_close(alone.ce, dice_ce(logits, target).ce)


def test_regions_are_separate_losses(backend):
    logits, labels = torch.randn(2, 3, 40), torch.randint(-1, 3, (2, 40))
    regions = torch.randint(0, 2, (2, 40), dtype=torch.uint8)
    ce, dice = dice_ce(logits, labels, regions=regions)
    for r in range(2):
        alone = dice_ce(logits, labels.where(regions == r, -1))
        torch.testing.assert_close((ce[r : r + 1], dice[r : r + 1]), tuple(alone))


def test_one_hot_target_is_the_label(backend):
    logits, labels = torch.randn(2, 3, 40), torch.randint(0, 3, (2, 40))
    soft = torch.nn.functional.one_hot(labels, 3).movedim(-1, 1).float()
    torch.testing.assert_close(dice_ce(logits, soft), dice_ce(logits, labels))


def test_region_without_voxels_is_zero(backend):
    logits = torch.randn(2, 3, 40, requires_grad=True)
    ce, dice = dice_ce(
        logits, torch.full((2, 40), 1), regions=torch.ones(2, 40, dtype=torch.uint8), num_regions=3
    )
    assert ce[[0, 2]].eq(0).all() and dice[[0, 2]].abs().max() < 1e-6 and ce[1] > 0 and dice[1] > 0
    (ce + dice)[[0, 2]].sum().backward()
    assert logits.grad.eq(0).all()


def test_ignored_labels_have_no_gradient(backend):
    logits, labels = torch.randn(2, 3, 40, requires_grad=True), torch.randint(0, 3, (2, 40))
    labels[:, ::3] = -100
    ce, dice = dice_ce(logits, labels)
    (ce + dice).sum().backward()
    assert logits.grad[:, :, ::3].eq(0).all() and logits.grad[:, :, 1::3].ne(0).all()


@pytest.mark.parametrize("dtype", INTEGER_DTYPES)
def test_label_dtypes(backend, dtype):
    logits = torch.randn(2, 3, 70, requires_grad=True)
    labels = torch.randint(-1 if dtype.is_signed else 0, 3, (2, 70))
    results = [dice_ce(logits, labels), dice_ce(logits, labels.to(dtype))]
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)
    gradients = [torch.autograd.grad((ce + dice).sum(), logits)[0] for ce, dice in results]
    torch.testing.assert_close(gradients[0], gradients[1], rtol=0, atol=0)


def test_nan(backend):
    logits = torch.randn(2, 3, 40)
    logits[1, 2, 7] = torch.nan
    labels = torch.randint(0, 3, (2, 40))
    regions = torch.zeros(2, 40, dtype=torch.uint8)
    regions[1, :20] = 1
    ce, dice = dice_ce(logits, labels, regions=regions)
    assert ce[0].isfinite() and dice[0].isfinite() and ce[1].isnan() and dice[1].isnan()
    labels[1, 7] = -1
    ce, dice = dice_ce(logits, labels, regions=regions)
    assert ce.isfinite().all() and dice.isfinite().all()


def test_nan_of_a_soft_target_stays_in_its_region(backend):
    logits, target = torch.randn(2, 3, 40, requires_grad=True), torch.randn(2, 3, 40).softmax(1)
    regions = torch.zeros(2, 40, dtype=torch.uint8)
    regions[1, :20] = 1
    target[1, 2, 7] = torch.nan
    ce, dice = dice_ce(logits, target, regions=regions)
    assert ce[0].isfinite() and dice[0].isfinite() and ce[1].isnan() and dice[1].isnan()
    (ce + dice)[0].backward()
    assert logits.grad[0].isfinite().all()


@pytest.mark.parametrize("loss", ["ce", "dice"])
def test_nan_of_a_loss_that_is_not_differentiated_stays_there(backend, loss):
    """Cross-entropy's gradient is a voxel's own; Dice's is every voxel's of the region."""
    logits = torch.randn(2, 3, 40)
    logits[1, 2, 7] = torch.nan
    logits.requires_grad_()
    losses = dice_ce(logits, torch.randint(0, 3, (2, 40)))
    getattr(losses, loss).sum().backward()
    spoilt = logits.grad.isnan()
    assert spoilt[1, :, 7].all() and spoilt.sum() == (3 if loss == "ce" else 2 * 3 * 40)


@pytest.mark.parametrize("num_classes", [3, 4])  # in tiles of any number of classes, and of four
def test_a_class_of_minus_infinity_is_left_out(backend, num_classes):
    """As a mask of classes makes them."""
    logits = torch.zeros(1, num_classes, 1)
    logits[0, 2:] = -torch.inf
    logits.requires_grad_()
    soft = torch.zeros(1, num_classes, 1)
    soft[0, 0] = 1
    for target in (torch.tensor([[0]]), soft):
        ce, dice = dice_ce(logits, target)
        torch.testing.assert_close(ce, torch.tensor([math.log(2)]))
        (gradient,) = torch.autograd.grad(ce + dice, logits, torch.ones(1))
        assert dice.isfinite().all() and gradient.isfinite().all() and gradient[0, 2:].abs().max() < 1e-30


def test_labels_and_regions_out_of_range(backend):
    logits, labels = torch.randn(2, 4, 9), torch.zeros(2, 9, dtype=torch.uint8)
    regions = torch.full((2, 9), 1, dtype=torch.uint8)
    regions[1, 8] = 5
    if backend in UNCHECKED:
        labels[0, 2] = 255
        ignored = labels.short().where((labels < 4) & (regions < 2), -1)
        expected = dice_ce(logits, ignored, regions=regions.clamp_max(1), num_regions=2)
        actual = dice_ce(logits, labels, regions=regions, num_regions=2)
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)
        return
    with pytest.raises(ValueError, match=r"^regions holds 5, accepted are 0\.\.1$"):
        dice_ce(logits, labels, regions=regions, num_regions=2)
    labels[0, 2] = 255
    with pytest.raises(
        ValueError, match=r"^target holds 255, accepted are 0\.\.3 and negative values \(ignored\)$"
    ):
        dice_ce(logits, labels)


def test_reference_gradient():
    logits = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    labels, regions = torch.randint(-1, 3, (2, 4)), torch.randint(0, 2, (2, 4), dtype=torch.uint8)
    soft = torch.randn(2, 3, 4, dtype=torch.float64).softmax(1)
    for target in (labels, soft):
        for dice in ({}, {"squared": False, "include_background": False}):
            assert torch.autograd.gradcheck(
                lambda x, t=target, dice=dice: tuple(
                    reference.dice_ce(x, t, regions=regions, num_regions=2, temperature=0.7, **dice)
                ),
                logits,
            )
