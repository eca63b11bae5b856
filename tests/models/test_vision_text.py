"""Consistency with text: eq. 5 by hand, the map of reliable voxels, classes that have none."""

import pytest
import torch
import torch.nn.functional as F

from semiseg.models import VisionTextConsistency, agreement_map
from semiseg.models.vision_text import text_distance, unit_vectors

PROTOTYPES = torch.tensor([[3.0, 4.0], [1.0, 0.0]])
TEXT = torch.tensor([[1.0, 0.0], [0.0, 2.0]])


def test_equation_5():
    # cos((3, 4), (1, 0)) = 3/5 and cos((1, 0), (0, 2)) = 0: the mean of 0.4 and 1 is 0.7
    weight = torch.ones(1, 2, 3)
    assert text_distance(PROTOTYPES, TEXT, weight).item() == pytest.approx(0.7)
    weight[:, 1] = 0  # without class 1 only 0.4 is left
    assert text_distance(PROTOTYPES, TEXT, weight).item() == pytest.approx(0.4)
    assert text_distance(PROTOTYPES, TEXT, torch.zeros(1, 2, 3)).item() == 0


def confident(classes):  # [B, *S] -> [B, 3, *S]
    return 10.0 * F.one_hot(torch.tensor(classes), 3).movedim(-1, 1)


def test_map_of_agreement():
    # 4 x 4 pixels to 2 x 2: a and b err in one pixel each, so the quarters hold 4, 3, 3 and 4 right ones
    labels = torch.tensor([[[0, 0, 1, 1], [0, 0, 1, 2], [2, 2, 1, 1], [2, 2, 2, 2]]])
    classes_a, classes_b = labels.clone(), labels.clone()
    classes_a[0, 0, 2] = 0
    classes_b[0, 2, 0] = 1
    arguments = (confident(classes_a.tolist()), confident(classes_b.tolist()), labels.to(torch.uint8))
    area = agreement_map(*arguments, torch.Size((2, 2)))
    expected = [[[1, 0], [0, 0]], [[0, 0.5], [0, 0.5]], [[0, 0.25], [0.75, 0.5]]]
    assert area[0].tolist() == expected and area.dtype == torch.float32
    # Of the corners (0, 0), (0, 2), (2, 0), (2, 2).
    nearest = agreement_map(*arguments, torch.Size((2, 2)), "nearest")
    assert nearest[0].tolist() == [[[1, 0], [0, 0]], [[0, 0], [0, 1]], [[0, 0], [0, 0]]]


@pytest.mark.parametrize("dimensions", [2, 3])
@pytest.mark.parametrize("heads", [1, 2])
def test_module_is_equations_4_and_5(dimensions, heads):
    text = torch.randn(3, 12)
    consistency = VisionTextConsistency(text, 8, dimensions=dimensions, heads=heads)
    for parameter in consistency.parameters():
        torch.nn.init.normal_(parameter)
    shape = (2, 3, 4, 2)[: dimensions + 1]
    features = torch.randn(shape[0], 8, *shape[1:], requires_grad=True)
    weight = torch.rand(shape[0], 3, *shape[1:])
    weight[:, 2] = 0  # no agreeing voxel
    loss = consistency(features, weight)
    prototypes = torch.zeros(2, 12, dtype=torch.float64)
    for first, _, second in consistency.projections:
        flat = features.double().movedim(1, -1).reshape(-1, 8)
        hidden = torch.relu(flat @ first.weight.double().reshape(8, 8).T + first.bias.double())
        projected = hidden @ second.weight.double().reshape(12, 8).T + second.bias.double()
        projected = projected / projected.norm(dim=1, keepdim=True)
        for c in range(2):
            share = weight.double()[:, c].reshape(-1, 1)
            prototypes[c] += (share * projected).sum(0) / share.sum() / heads
    expected = (1 - F.cosine_similarity(prototypes, text[:2].double(), dim=1)).mean()
    assert loss.item() == pytest.approx(expected.item(), abs=1e-5)
    loss.backward()
    assert features.grad.isfinite().all() and features.grad.any()


def test_no_agreeing_voxel_at_all():
    consistency = VisionTextConsistency(torch.randn(3, 12), 8, dimensions=3)
    features = torch.randn(2, 8, 2, 2, 1, requires_grad=True)
    loss = consistency(features, torch.zeros(2, 3, 2, 2, 1))
    loss.backward()
    assert loss.item() == 0
    for tensor in (features, *consistency.parameters()):
        assert torch.equal(tensor.grad, torch.zeros_like(tensor))


def test_unit_vectors_and_their_gradients():
    v = torch.randn(2, 5, 3, 4)
    v[0, :, 1, 2], v[1, :, 0, 0] = 0, 1e-9
    along, factors = v.clone().requires_grad_(), torch.randn(2, 5, 3, 4)
    units = unit_vectors(along)
    (units * factors).sum().backward()
    (F.normalize(v.requires_grad_(), dim=1) * factors).sum().backward()
    short = torch.zeros(2, 1, 3, 4, dtype=torch.bool)
    short[0, :, 1, 2] = short[1, :, 0, 0] = True
    assert torch.equal(units, F.normalize(v, dim=1).masked_fill(short, 0))
    assert torch.equal(along.grad, v.grad.masked_fill(short, 0))


def test_a_dead_voxel_leaves_the_gradients_small():
    consistency = VisionTextConsistency(torch.randn(2, 12), 8, dimensions=2)
    torch.nn.init.zeros_(consistency.projections[0][2].weight)  # every projected feature is zero
    features = torch.randn(1, 8, 2, 2, requires_grad=True)
    consistency(features, torch.ones(1, 2, 2, 2)).backward()
    assert all(parameter.grad.abs().max() < 1 for parameter in consistency.parameters())
