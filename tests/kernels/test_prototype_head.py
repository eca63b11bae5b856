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

from semiseg_kernels import (
    cluster_mean,
    dice_ce,
    prototype_head,
    prototype_info_nce,
    prototype_similarity,
    reference,
)


def named(z, prototypes, **options):
    return prototype_head(z, prototypes, **options)._asdict()


def random_targets(z, num_classes, num_regions=2):
    shape = (z.shape[0], *z.shape[2:])
    return {
        "labels": torch.randint(-1, num_classes, shape, dtype=torch.int8),
        "regions": torch.randint(0, num_regions, shape, dtype=torch.uint8),
        "num_regions": num_regions,
        "weight": torch.rand(shape) * torch.randint(0, 2, shape),
    }


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_accuracy(kernel, case, dtype, layout):
    batch, spatial, d, num_classes, per_class = CASES[case]
    prototypes = make_prototypes(d, num_classes, per_class)
    z = make_embedding(batch, spatial, prototypes, dtype, layout)
    targets = random_targets(z, num_classes)
    kept = (
        torch.stack([(targets["labels"] >= 0) & (targets["regions"] == r) for r in range(2)])
        .flatten(1)
        .sum(1)
    )
    largest_share = z[:, 0].numel() / max(int(kept.min()), 1)
    assert_accurate(kernel, lambda z: named(z, prototypes, **targets), z, scale=10 * largest_share)


@pytest.mark.parametrize(
    "options",
    [
        {"positive": "label"},
        {"positive": "label", "ignore_prototype": 4},
        {"ignore_prototype": 0},
        {"unit_length": True, "require_agreement": True},
        {"return_similarity": False},
        {"class_temperature": 0.5, "temperature": 0.25},
        {"num_regions": 5},
        {"squared": False},
        {"squared": False, "num_regions": 5},
    ],
    ids=str,
)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_accuracy_of_options(kernel, layout, options):
    prototypes = make_prototypes(16, 3, 2)
    z = make_embedding(2, (9, 11), prototypes, layout=layout)
    targets = random_targets(z, 3) | options
    assert_accurate(kernel, lambda z: named(z, prototypes, **targets), z, scale=10)


def test_accuracy_of_plain_dot_products(kernel):
    prototypes = make_prototypes(16, 3, 2) * torch.rand(3, 2, 1)
    z = make_embedding(2, (9, 11), prototypes)
    targets = random_targets(z, 3)
    largest = (
        torch.linalg.vector_norm(z.double(), dim=1).max() * torch.linalg.vector_norm(prototypes, dim=2).max()
    )
    assert_accurate(
        kernel,
        lambda z: named(z, prototypes, normalize=False, **targets),
        z,
        scale=10 * float(largest),
        unit=False,
    )


def test_accuracy_without_labels(kernel):
    prototypes = make_prototypes(16, 3, 2)
    z = make_embedding(2, (9, 11), prototypes)
    assert_accurate(kernel, lambda z: named(z, prototypes), z, scale=10)


@pytest.mark.parametrize(("positive", "squared"), [("nearest", True), ("label", False)])
def test_is_its_parts(backend, positive, squared):
    prototypes = make_prototypes(16, 3, 2)
    z = make_embedding(2, (9, 11), prototypes)
    targets = random_targets(z, 3)
    labels, weight = targets["labels"], targets["weight"]
    head = prototype_head(z, prototypes, **targets, positive=positive, class_temperature=0.2, temperature=0.3, squared=squared)
    torch.testing.assert_close((head.similarity, head.index), prototype_similarity(z, prototypes))
    torch.testing.assert_close(
        (head.ce, head.dice),
        tuple(dice_ce(head.similarity, labels, regions=targets["regions"], num_regions=2, temperature=0.2, squared=squared)),
    )
    torch.testing.assert_close(
        (head.cluster_sum, head.cluster_count), cluster_mean(z, prototypes, labels, weight=weight)
    )
    if positive == "label":
        alone = prototype_info_nce(z, prototypes, labels=labels, temperature=0.3)
    else:
        alone = prototype_info_nce(z, prototypes, weight=labels >= 0, temperature=0.3)
    torch.testing.assert_close(head.info_nce, alone)


def test_results_that_were_not_asked_for_are_none(backend):
    z, prototypes = torch.randn(2, 16, 9), torch.randn(3, 2, 16)
    head = prototype_head(z, prototypes, return_similarity=False)
    assert head.info_nce.shape == ()
    assert all(result is None for result in head._replace(info_nce=None))
    head = prototype_head(z, prototypes, labels=torch.zeros(2, 9, dtype=torch.uint8))
    assert all(result is not None for result in head)
    assert head.ce.shape == head.dice.shape == (1,)


def test_gradient_of_any_subset(kernel):
    """A result that the loss does not use sends nothing, and everything together sends the sum."""
    prototypes = make_prototypes(16, 3, 2)
    z = make_embedding(2, (9, 11), prototypes).requires_grad_()
    head = prototype_head(z, prototypes, **random_targets(z, 3))
    parts = [head.similarity.square().mean(), head.ce.sum(), head.dice.sum(), head.info_nce]
    gradients = [torch.autograd.grad(part, z, retain_graph=True)[0] for part in parts]
    together = torch.autograd.grad(sum(parts), z)[0]
    torch.testing.assert_close(together, sum(gradients), rtol=1e-5, atol=1e-6 * float(together.abs().max()))


def test_expanded_gradient(kernel):
    """sum() sends a gradient without strides."""
    prototypes, z = make_prototypes(16, 3, 2), torch.randn(2, 16, 9, requires_grad=True)
    head = prototype_head(z, prototypes, **random_targets(z, 3))
    expanded = torch.autograd.grad(head.similarity.sum(), z, retain_graph=True)[0]
    dense = torch.autograd.grad(head.similarity, z, torch.ones_like(head.similarity))[0]
    torch.testing.assert_close(expanded, dense, rtol=0, atol=0)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_zero_vectors(backend, layout):
    prototypes, z = make_prototypes(16, 3, 2), torch.randn(2, 16, 30)
    z[:, :, 7] = 0
    z = in_layout(z, layout).requires_grad_()
    head = prototype_head(z, prototypes, **random_targets(z, 3))
    (head.similarity.sum() + head.ce.sum() + head.dice.sum() + head.info_nce).backward()
    assert head.similarity[:, :, 7].eq(0).all()
    assert z.grad[:, :, 7].eq(0).all() and z.grad.isfinite().all() and z.grad.ne(0).any()


def test_nan(backend):
    prototypes, z = make_prototypes(16, 3, 2), torch.randn(2, 16, 30)
    z[1, 3, 7] = torch.nan
    targets = random_targets(z, 3)
    targets["labels"][1, 7], targets["regions"][1, 7], targets["weight"][1, 7] = 2, 1, 1
    targets["regions"][0, 0], targets["labels"][0, 0] = 0, 0
    z.requires_grad_()
    head = prototype_head(z, prototypes, **targets)
    assert (
        head.similarity.isnan().sum() == 3
        and head.similarity[1, :, 7].isnan().all()
        and (head.index < 2).all()
    )
    assert head.ce[0].isfinite() and head.dice[0].isfinite()
    assert head.ce[1].isnan() and head.dice[1].isnan() and head.info_nce.isnan()
    assert head.cluster_sum[2, 0, 3].isnan() and head.cluster_count.isfinite().all()
    (head.similarity.sum() + head.ce.sum() + head.dice.sum() + head.info_nce).backward()
    targets["labels"][1, 7] = -1
    head = prototype_head(z, prototypes, **targets)
    assert head.ce.isfinite().all() and head.dice.isfinite().all() and head.info_nce.isfinite()


def test_nan_of_a_voxel_spoils_its_own_cross_entropy_alone(backend):
    prototypes, z = make_prototypes(16, 3, 2), torch.randn(2, 16, 30)
    z[1, 3, 7] = torch.nan
    z.requires_grad_()
    prototype_head(z, prototypes, labels=torch.randint(0, 3, (2, 30))).ce.sum().backward()
    spoilt = z.grad.isnan()
    assert spoilt[1, :, 7].all() and spoilt.sum() == 16


def test_labels_and_regions_out_of_range(backend):
    z, prototypes = torch.randn(2, 16, 9), torch.randn(4, 2, 16)
    labels, regions = torch.zeros(2, 9, dtype=torch.uint8), torch.zeros(2, 9, dtype=torch.uint8)
    regions[1, 8] = 5
    if backend in UNCHECKED:
        labels[0, 2] = 7
        ignored = labels.short().where((labels < 4) & (regions < 2), -1)
        expected = prototype_head(
            z, prototypes, labels=ignored, regions=regions.clamp_max(1), num_regions=2
        )
        actual = prototype_head(z, prototypes, labels=labels, regions=regions, num_regions=2)
        torch.testing.assert_close((actual.ce, actual.dice), (expected.ce, expected.dice), rtol=0, atol=0)
        return
    with pytest.raises(ValueError, match=r"^regions holds 5, accepted are 0\.\.1$"):
        prototype_head(z, prototypes, labels=labels, regions=regions, num_regions=2)
    labels[0, 2] = 7
    with pytest.raises(
        ValueError, match=r"^labels holds 7, accepted are 0\.\.3 and negative values \(ignored\)$"
    ):
        prototype_head(z, prototypes, labels=labels)


def test_four_million_voxels(kernel):
    n = 4_194_304 + 5
    prototypes = make_prototypes(3, 2, 2)
    z = torch.randn(1, 3, n)
    targets = random_targets(z, 2)
    head = prototype_head(z, prototypes, **targets)
    exact = reference.prototype_head(z.double(), prototypes, **targets)
    for name in ("ce", "dice", "info_nce"):
        torch.testing.assert_close(getattr(head, name).double(), getattr(exact, name), rtol=1e-6, atol=0)
    # Of four million voxels a few lie so close to the border of two clusters that rounding decides.
    assert (head.cluster_count - exact.cluster_count).abs().max() <= 10
    torch.testing.assert_close(head.cluster_sum.double(), exact.cluster_sum, rtol=1e-4, atol=10)


@pytest.mark.parametrize("options", [{}, {"positive": "label", "normalize": False}], ids=str)
def test_reference_gradient(options):
    prototypes = torch.randn(3, 2, 5, dtype=torch.float64)
    z = torch.randn(2, 5, 4, dtype=torch.float64, requires_grad=True)
    targets = random_targets(z, 3)

    def losses(z):
        head = reference.prototype_head(
            z, prototypes, **targets, **options, class_temperature=0.5, temperature=0.5
        )
        return head.similarity, head.ce, head.dice, head.info_nce

    assert torch.autograd.gradcheck(losses, z)
