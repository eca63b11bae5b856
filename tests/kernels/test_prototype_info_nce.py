import math

import pytest
import torch
from comparison import (
    CASES,
    DTYPES,
    LAYOUTS,
    UNCHECKED,
    assert_accurate,
    in_layout,
    make_embedding,
    make_prototypes,
)

from semiseg_kernels import prototype_info_nce, reference
from semiseg_kernels.checks import INTEGER_DTYPES, WEIGHT_DTYPES


def named(z, prototypes, **options):
    return {"loss": prototype_info_nce(z, prototypes, **options)}


def random_labels(z, num_classes):
    return torch.randint(-1, num_classes, (z.shape[0], *z.shape[2:]), dtype=torch.int16)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_accuracy(kernel, case, dtype, layout):
    batch, spatial, d, num_classes, per_class = CASES[case]
    prototypes = make_prototypes(d, num_classes, per_class)
    z = make_embedding(batch, spatial, prototypes, dtype, layout)
    assert_accurate(kernel, lambda z: named(z, prototypes), z, scale=10)
    labels = random_labels(z, num_classes)
    weight = torch.rand(labels.shape) * torch.randint(0, 2, labels.shape)
    options = {"labels": labels, "weight": weight, "temperature": 0.5}
    largest_share = weight.numel() / max(float(weight[labels >= 0].sum()), 1)
    assert_accurate(kernel, lambda z: named(z, prototypes, **options), z, scale=2 * largest_share)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("labelled", [False, True])
def test_accuracy_of_plain_dot_products(kernel, labelled, dtype, layout):
    """With lengths that differ, the largest dot product is not always that of the nearest prototype."""
    prototypes = make_prototypes(17, 3, 4) * torch.rand(3, 4, 1)
    z = make_embedding(2, (31, 9), prototypes, dtype, layout)
    labels = random_labels(z, 3) if labelled else None
    largest = (
        torch.linalg.vector_norm(z.double(), dim=1).max() * torch.linalg.vector_norm(prototypes, dim=2).max()
    )
    assert_accurate(
        kernel, lambda z: named(z, prototypes, normalize=False, labels=labels), z,
        scale=10 * float(largest), unit=False,
    )  # fmt: skip


def test_large_plain_dot_products(backend):
    """exp of the scores overflows unless their own maximum is taken out."""
    prototypes = torch.tensor([[[1.0, 0.0]], [[40.0, 30.0]]])
    z = torch.tensor([100.0, 1.0]).view(1, 2, 1).requires_grad_()
    loss = prototype_info_nce(z, prototypes, normalize=False)
    torch.testing.assert_close(loss, torch.tensor((4030.0 - 100.0) / 0.1))
    loss.backward()
    torch.testing.assert_close(z.grad.flatten(), torch.tensor([390.0, 300.0]))


@pytest.mark.parametrize("ignore_prototype", [0, 4])
@pytest.mark.parametrize("labelled", [False, True])
def test_accuracy_with_an_ignored_prototype(kernel, labelled, ignore_prototype):
    prototypes = make_prototypes(16, 2, 3)
    z = make_embedding(2, (11, 13), prototypes)
    options = {"ignore_prototype": ignore_prototype, "labels": random_labels(z, 2) if labelled else None}
    assert_accurate(kernel, lambda z: named(z, prototypes, **options), z, scale=10)


def test_ignored_prototype_drops_its_voxels(backend):
    prototypes = torch.eye(3).unsqueeze(1)
    z = torch.eye(3).T.view(1, 3, 3).clone().requires_grad_()  # voxel i is nearest to prototype i
    prototype_info_nce(z, prototypes, ignore_prototype=1).backward()
    assert z.grad[0, :, 1].eq(0).all() and z.grad[0, :, 0].ne(0).any() and z.grad[0, :, 2].ne(0).any()


def test_worked_by_hand(backend):
    prototypes = torch.tensor([[[5.0, 0.0]], [[0.0, 2.0]]])
    z = torch.tensor([3.0, 0.0]).view(1, 2, 1)  # cosines 1 and 0
    torch.testing.assert_close(
        prototype_info_nce(z, prototypes, temperature=1.0), torch.tensor(math.log(1 + math.exp(-1)))
    )
    torch.testing.assert_close(
        prototype_info_nce(z, prototypes, temperature=0.5, labels=torch.tensor([[1]])),
        torch.tensor(math.log(math.exp(2) + 1)),
    )
    two = torch.tensor([[3.0, 0.0], [0.0, 1.0]]).T.unsqueeze(0)
    torch.testing.assert_close(  # (3 * log(1 + e^-1) + 1 * log(1 + e)) / 4
        prototype_info_nce(
            two, prototypes, temperature=1.0, labels=torch.tensor([[0, 0]]), weight=torch.tensor([[3.0, 1.0]])
        ),
        torch.tensor((3 * math.log(1 + math.exp(-1)) + math.log(1 + math.e)) / 4),
    )


@pytest.mark.parametrize("dtype", INTEGER_DTYPES)
def test_label_dtypes(backend, dtype):
    prototypes, z = make_prototypes(16, 3, 2), torch.randn(2, 16, 70, requires_grad=True)
    labels = torch.randint(-1 if dtype.is_signed else 0, 3, (2, 70))
    expected = prototype_info_nce(z, prototypes, labels=labels)
    actual = prototype_info_nce(z, prototypes, labels=labels.to(dtype))
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)
    gradients = [torch.autograd.grad(loss, z)[0] for loss in (actual, expected)]
    torch.testing.assert_close(gradients[0], gradients[1], rtol=0, atol=0)


@pytest.mark.parametrize("dtype", WEIGHT_DTYPES)
def test_weight_dtypes(backend, dtype):
    prototypes, z = make_prototypes(16, 3, 2), torch.randn(2, 16, 70)
    weight = torch.randint(0, 2, (2, 70)) if dtype in (torch.bool, torch.uint8) else torch.rand(2, 70)
    expected = prototype_info_nce(z, prototypes, weight=weight.to(dtype).float())
    torch.testing.assert_close(
        prototype_info_nce(z, prototypes, weight=weight.to(dtype)), expected, rtol=0, atol=0
    )


@pytest.mark.parametrize("option", ["no voxel", "labels", "weight", "ignore_prototype"])
def test_nothing_kept_is_zero(backend, option):
    prototypes = torch.ones(1, 1, 4)
    z = torch.randn(2, 4, 0 if option == "no voxel" else 9, requires_grad=True)
    options = {
        "no voxel": {},
        "labels": {"labels": torch.full((2, 9), -1)},
        "weight": {"weight": torch.zeros(2, 9)},
        "ignore_prototype": {"ignore_prototype": 0},
    }
    loss = prototype_info_nce(z, prototypes, **options[option])
    assert loss.shape == () and loss.dtype == torch.float32 and loss == 0
    loss.backward()
    assert z.grad.eq(0).all()


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_zero_vectors(backend, layout, normalize):
    prototypes = make_prototypes(16, 2, 3)
    z = torch.randn(2, 16, 30)
    z[:, :, 7] = 0
    z = in_layout(z, layout).requires_grad_()
    loss = prototype_info_nce(z[:, :, 7:8], prototypes, normalize=normalize)
    torch.testing.assert_close(loss, torch.tensor(math.log(6)))
    prototype_info_nce(z, prototypes, normalize=normalize).backward()
    assert z.grad.isfinite().all()
    assert z.grad[:, :, 7].eq(0).all() == normalize  # a plain dot product does have a gradient there


def test_nan(backend):
    prototypes, z = make_prototypes(16, 2, 3), torch.randn(2, 16, 63)
    z[1, 4, 5] = torch.nan
    z.requires_grad_()
    labels = torch.randint(0, 2, (2, 63))
    loss = prototype_info_nce(z, prototypes, labels=labels)
    assert loss.isnan()
    loss.backward()
    assert z.grad[0].isfinite().all() and z.grad[1, :, :5].isfinite().all()
    labels[1, 5] = -1
    assert prototype_info_nce(z, prototypes, labels=labels).isfinite()
    weight = torch.ones(2, 63)
    weight[1, 5] = 0
    assert prototype_info_nce(z, prototypes, weight=weight).isfinite()


def test_label_out_of_range(backend):
    z, prototypes, labels = torch.randn(2, 16, 9), torch.randn(4, 2, 16), torch.zeros(2, 9, dtype=torch.uint8)
    labels[1, 3] = 7
    if backend in UNCHECKED:
        expected = prototype_info_nce(z, prototypes, labels=labels.short().where(labels < 4, -1))
        torch.testing.assert_close(prototype_info_nce(z, prototypes, labels=labels), expected, rtol=0, atol=0)
        return
    with pytest.raises(
        ValueError, match=r"^labels holds 7, accepted are 0\.\.3 and negative values \(ignored\)$"
    ):
        prototype_info_nce(z, prototypes, labels=labels)


@pytest.mark.parametrize("normalize", [True, False])
def test_reference_gradient(normalize):
    prototypes = torch.randn(3, 2, 5, dtype=torch.float64)
    z = torch.randn(2, 5, 4, dtype=torch.float64, requires_grad=True)
    labels, weight = torch.randint(-1, 3, (2, 4)), torch.rand(2, 4, dtype=torch.float64)
    labels[0, 0] = 1
    assert torch.autograd.gradcheck(
        lambda z: reference.prototype_info_nce(
            z, prototypes, labels=labels, weight=weight, normalize=normalize
        ),
        z,
    )
    assert torch.autograd.gradcheck(
        lambda z: reference.prototype_info_nce(z, prototypes, normalize=normalize), z
    )
