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

from semiseg_kernels import cluster_mean, use_backend
from semiseg_kernels.checks import INTEGER_DTYPES, WEIGHT_DTYPES

OPTIONS = [
    {},
    {"unit_length": True},
    {"require_agreement": True},
    {"unit_length": True, "require_agreement": True},
]


def named(z, prototypes, labels, **options):
    cluster_sum, cluster_count = cluster_mean(z, prototypes, labels, **options)
    return {"cluster_sum": cluster_sum, "cluster_count": cluster_count}


def random_labels(z, num_classes):
    return torch.randint(-1, num_classes, (z.shape[0], *z.shape[2:]), dtype=torch.int16)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_accuracy(kernel, case, dtype, layout):
    batch, spatial, d, num_classes, per_class = CASES[case]
    prototypes = make_prototypes(d, num_classes, per_class)
    z = make_embedding(batch, spatial, prototypes, dtype, layout)
    labels = random_labels(z, num_classes)
    weight = torch.rand(labels.shape) * torch.randint(0, 2, labels.shape)
    # Every pair of options once, and both counts of voxels.
    for options, given in zip(OPTIONS, (None, weight, weight, None), strict=True):
        assert_accurate(kernel, lambda z, o=options, w=given: named(z, prototypes, labels, weight=w, **o), z)
    for options in OPTIONS[::2]:
        with use_backend("reference"):
            expected_count = cluster_mean(z, prototypes, labels, **options)[1]
        assert torch.equal(cluster_mean(z, prototypes, labels, **options)[1], expected_count)


def test_against_a_loop_over_voxels(backend):
    """The definition once more, voxel by voxel."""
    prototypes = make_prototypes(5, 3, 2).double()
    z = make_embedding(2, (4, 3), prototypes)
    labels, weight = random_labels(z, 3), torch.rand(2, 4, 3)
    expected_sum, expected_count = (
        torch.zeros(3, 2, 5, dtype=torch.float64),
        torch.zeros(3, 2, dtype=torch.float64),
    )
    for b, i, j in torch.cartesian_prod(torch.arange(2), torch.arange(4), torch.arange(3)).tolist():
        label = int(labels[b, i, j])
        v = z[b, :, i, j].double()
        if label < 0:
            continue
        k = int(torch.cosine_similarity(prototypes[label], v, dim=1).argmax())
        expected_sum[label, k] += weight[b, i, j] * v
        expected_count[label, k] += weight[b, i, j]
    actual_sum, actual_count = cluster_mean(z, prototypes.float(), labels, weight=weight)
    assert actual_sum.dtype == torch.float32 and actual_count.dtype == torch.float64
    torch.testing.assert_close(actual_sum, expected_sum.float())
    torch.testing.assert_close(actual_count, expected_count)


def test_agreement_drops_voxels_of_another_class(backend):
    prototypes = torch.eye(2).unsqueeze(1)
    z = torch.tensor([[[1.0, 2.0, 0.5], [0.0, 1.0, 3.0]]])  # nearest to classes 0, 0, 1
    labels = torch.tensor([[0, 1, 1]])
    assert cluster_mean(z, prototypes, labels)[1].flatten().tolist() == [1, 2]
    cluster_sum, count = cluster_mean(z, prototypes, labels, require_agreement=True)
    assert count.flatten().tolist() == [1, 1]
    torch.testing.assert_close(cluster_sum, torch.tensor([[[1.0, 0.0]], [[0.5, 3.0]]]))


def test_agreement_ties_go_to_the_lowest_class(backend):
    prototypes = torch.ones(2, 1, 4)
    z, labels = torch.ones(1, 4, 2), torch.tensor([[0, 1]])
    assert cluster_mean(z, prototypes, labels, require_agreement=True)[1].flatten().tolist() == [1, 0]


@pytest.mark.parametrize("dtype", INTEGER_DTYPES)
def test_label_dtypes(backend, dtype):
    prototypes, z = make_prototypes(16, 3, 2), torch.randn(2, 16, 70)
    labels = torch.randint(-1 if dtype.is_signed else 0, 3, (2, 70))
    expected = cluster_mean(z, prototypes, labels)
    torch.testing.assert_close(cluster_mean(z, prototypes, labels.to(dtype)), expected, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", WEIGHT_DTYPES)
def test_weight_dtypes(backend, dtype):
    prototypes, z, labels = make_prototypes(16, 3, 2), torch.randn(2, 16, 70), torch.randint(-1, 3, (2, 70))
    weight = torch.randint(0, 2, (2, 70)) if dtype in (torch.bool, torch.uint8) else torch.rand(2, 70)
    expected = cluster_mean(z, prototypes, labels, weight=weight.to(dtype).float())
    actual = cluster_mean(z, prototypes, labels, weight=weight.to(dtype))
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def test_four_million_voxels_are_counted_and_summed(kernel):
    n = 4_194_304 + 5
    prototypes = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])
    z = torch.stack([torch.full((n,), 1.1), torch.rand(n)]).unsqueeze(0)
    cluster_sum, count = cluster_mean(z, prototypes, torch.zeros(1, n, dtype=torch.uint8))
    assert count.flatten().tolist() == [n, 0]
    torch.testing.assert_close(
        cluster_sum[0, 0], z.double().sum((0, 2)).float(), rtol=torch.finfo(torch.float32).eps, atol=0
    )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_zero_vectors_join_the_first_prototype(backend, layout):
    prototypes, z = make_prototypes(16, 2, 3), in_layout(torch.zeros(2, 16, 30), layout)
    for unit_length in (False, True):
        cluster_sum, count = cluster_mean(
            z, prototypes, torch.ones(2, 30, dtype=torch.uint8), unit_length=unit_length
        )
        assert count.tolist() == [[0, 0, 0], [60, 0, 0]] and cluster_sum.eq(0).all()


def test_empty_clusters_are_zero(backend):
    prototypes, z = make_prototypes(16, 3, 2), torch.randn(2, 16, 70)
    cluster_sum, count = cluster_mean(z, prototypes, torch.full((2, 70), 1))
    assert cluster_sum[[0, 2]].eq(0).all() and count[[0, 2]].eq(0).all() and count[1].sum() == 140
    cluster_sum, count = cluster_mean(z, prototypes, torch.full((2, 70), -1))
    assert cluster_sum.eq(0).all() and count.eq(0).all()


def test_nan_makes_its_cluster_nan(backend):
    prototypes, z = make_prototypes(16, 2, 3), torch.randn(2, 16, 63)
    z[1, 4, 5] = torch.nan
    labels = torch.randint(0, 2, (2, 63))
    labels[1, 5] = 1
    cluster_sum, count = cluster_mean(z, prototypes, labels)
    assert cluster_sum[1, 0, 4].isnan() and count.sum() == 126


@pytest.mark.parametrize("unit_length", [False, True])
@pytest.mark.parametrize("left_out", ["label", "weight"])
@pytest.mark.parametrize(("d", "num_classes", "per_class"), [(16, 2, 3), (16, 4, 3), (48, 14, 2)])
def test_nan_of_a_voxel_left_out_is_in_no_cluster(
    backend, d, num_classes, per_class, left_out, unit_length
):
    z, prototypes = torch.randn(2, d, 70), torch.randn(num_classes, per_class, d)
    labels, weight = torch.randint(0, num_classes, (2, 70)), torch.ones(2, 70)
    expected = cluster_mean(
        z[:, :, 1:], prototypes, labels[:, 1:], weight=weight[:, 1:], unit_length=unit_length
    )
    z[:, :, 0] = torch.nan
    (labels if left_out == "label" else weight)[:, 0] = -1 if left_out == "label" else 0
    actual = cluster_mean(z, prototypes, labels, weight=weight, unit_length=unit_length)
    torch.testing.assert_close(actual, expected)


def test_label_out_of_range(backend):
    z, prototypes, labels = torch.randn(2, 16, 9), torch.randn(4, 2, 16), torch.zeros(2, 9, dtype=torch.int64)
    labels[0, 8] = 4
    if backend in UNCHECKED:
        expected = cluster_mean(z, prototypes, labels.where(labels < 4, -1))
        torch.testing.assert_close(cluster_mean(z, prototypes, labels), expected, rtol=0, atol=0)
        return
    with pytest.raises(
        ValueError, match=r"^labels holds 4, accepted are 0\.\.3 and negative values \(ignored\)$"
    ):
        cluster_mean(z, prototypes, labels)


def test_uint64_label_beyond_int64_is_not_ignored(backend):
    labels = torch.full((1, 9), -1).to(torch.uint64)
    if backend in UNCHECKED:
        pytest.skip(f"backend {backend!r} ignores every label out of range")
    with pytest.raises(ValueError, match=r"labels holds \d+, accepted are 0\.\.3"):
        cluster_mean(torch.randn(1, 16, 9), torch.randn(4, 2, 16), labels)
