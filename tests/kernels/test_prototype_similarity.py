import pytest
import torch
from comparison import CASES, DTYPES, LAYOUTS, assert_accurate, in_layout, make_embedding, make_prototypes
from test_determinism import Allocations

from semiseg_kernels import prototype_similarity, reference
from semiseg_kernels.reference.common import EPSILON, cosine, flatten


def named(z, prototypes):
    similarity, index = prototype_similarity(z, prototypes)
    return {"similarity": similarity, "index": index}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_accuracy(kernel, case, dtype, layout):
    batch, spatial, d, num_classes, per_class = CASES[case]
    prototypes = make_prototypes(d, num_classes, per_class)
    z = make_embedding(batch, spatial, prototypes, dtype, layout)
    assert_accurate(kernel, lambda z: named(z, prototypes), z)


def test_accuracy_with_prototypes_of_the_embedding_dtype(kernel):
    prototypes = make_prototypes(16, 4, 3).bfloat16()
    z = make_embedding(2, (9, 11), prototypes, torch.bfloat16)
    assert_accurate(kernel, lambda z: named(z, prototypes.to(z.dtype)), z)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_four_million_voxels(kernel, layout):
    prototypes = make_prototypes(3, 2, 2)
    z = in_layout(torch.randn(1, 3, 4_194_304 + 5), layout)
    similarity, index = prototype_similarity(z, prototypes)
    exact = cosine(flatten(z.double()), prototypes)
    torch.testing.assert_close(
        similarity.double(), exact.amax(2), rtol=0, atol=8 * torch.finfo(torch.float32).eps
    )
    assert_nearest(index, exact, d=3)


@pytest.mark.parametrize("dtype", DTYPES)
def test_index_differs_only_where_candidates_tie(kernel, dtype):
    prototypes = make_prototypes(5, 3, 40)
    prototypes[:, 20:] = prototypes[:, :20] * (1 + 1e-6 * torch.randn(3, 20, 1)) + 1e-7 * torch.randn(
        3, 20, 5
    )
    z = torch.randn(2, 5, 4099).to(dtype)
    assert_nearest(prototype_similarity(z, prototypes)[1], cosine(flatten(z.double()), prototypes), d=5)


def assert_nearest(index, cosines, d):
    """No other prototype beats the named one by more than rounding the d terms of two dot products can."""
    resolution = 2 * (d + 2) * torch.finfo(torch.float32).eps
    chosen = cosines.gather(2, index.flatten(2).long().unsqueeze(2)).squeeze(2)
    assert (chosen >= cosines.amax(2) - resolution).all()


def test_ties_go_to_the_lowest_index(backend):
    prototypes = make_prototypes(16, 2, 7)
    prototypes[:, 4:] = prototypes[:, 1:2]  # 1, 4, 5 and 6 are the same
    z = prototypes[:, 1].T.expand(3, 16, 2).contiguous()
    _, index = prototype_similarity(z, prototypes)
    assert index[:, 0, 0].eq(1).all() and index[:, 1, 1].eq(1).all()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_zero_vectors(backend, layout):
    prototypes = make_prototypes(16, 2, 3)
    z = torch.randn(2, 16, 5, 7)
    z[:, :, 1] = 0
    z[:, :, 2] = EPSILON / 100
    z = in_layout(z, layout).requires_grad_()
    similarity, index = prototype_similarity(z, prototypes)
    assert similarity[:, :, 1].eq(0).all() and index[:, :, 1].eq(0).all()
    similarity.sum().backward()
    assert z.grad[:, :, 1:3].eq(0).all()
    assert z.grad[:, :, 3:].isfinite().all() and z.grad[:, :, 3:].ne(0).all()


def test_zero_prototype(backend):
    prototypes = torch.zeros(2, 1, 16)
    prototypes[1] = torch.randn(16)
    z = torch.randn(1, 16, 50, requires_grad=True)
    similarity, _ = prototype_similarity(z, prototypes)
    assert similarity[:, 0].eq(0).all() and similarity[:, 1].ne(0).all()
    similarity[:, 0].sum().backward()
    assert z.grad.eq(0).all()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_nan(backend, dtype, layout):
    prototypes = make_prototypes(16, 2, 3)
    z = torch.randn(2, 16, 63)
    z[0, 3, 5] = torch.nan
    z[1, :, 62] = torch.nan
    z = in_layout(z.to(dtype), layout)
    similarity, index = prototype_similarity(z, prototypes)
    assert similarity[0, :, 5].isnan().all() and similarity[1, :, 62].isnan().all()
    assert similarity.isnan().sum() == 4
    assert index[0, :, 5].eq(0).all() and (index < 3).all()


@pytest.mark.parametrize(("d", "num_classes", "per_class"), [(16, 2, 3), (17, 5, 3)])
def test_nan_of_a_prototype_is_in_its_class_alone(backend, d, num_classes, per_class):
    prototypes, z = torch.randn(num_classes, per_class, d), torch.randn(2, d, 300)
    prototypes[-1, -1, 3] = torch.nan
    similarity, index = prototype_similarity(z, prototypes)
    assert similarity[:, -1].isnan().all() and similarity[:, :-1].isfinite().all() and (index < per_class).all()


def test_strided_embedding(kernel):
    """Strides that no kernel reads in place are copied, and the gradient comes back where it belongs."""
    prototypes = make_prototypes(16, 2, 3)
    whole = make_embedding(2, (8, 10, 12), prototypes)
    sliced = whole[:, :, ::2, :, 1::3].requires_grad_()
    compact = sliced.detach().clone(memory_format=torch.contiguous_format).requires_grad_()
    results = [prototype_similarity(z, prototypes) for z in (sliced, compact)]
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)
    gradients = [
        torch.autograd.grad(r[0].square().sum(), z)[0]
        for r, z in zip(results, (sliced, compact), strict=True)
    ]
    torch.testing.assert_close(gradients[0], gradients[1], rtol=0, atol=0)


def test_sliced_channels_are_read_in_place(kernel):
    prototypes = make_prototypes(16, 2, 3)
    wide = torch.randn(2, 20, 5, 6, 7)
    result = prototype_similarity(wide[:, 2:18], prototypes)
    torch.testing.assert_close(
        result, prototype_similarity(wide[:, 2:18].contiguous(), prototypes), rtol=0, atol=0
    )


def test_index_dtype(backend):
    z = torch.randn(1, 4, 10)
    assert prototype_similarity(z, torch.randn(1, 256, 4))[1].dtype == torch.uint8
    assert prototype_similarity(z, torch.randn(1, 257, 4))[1].dtype == torch.int16


def test_no_gradient_to_prototypes(backend):
    prototypes = torch.randn(2, 3, 16, requires_grad=True)
    z = torch.randn(1, 16, 10, requires_grad=True)
    prototype_similarity(z, prototypes)[0].sum().backward()
    assert prototypes.grad is None and z.grad is not None


def test_autocast_changes_nothing(backend):
    z, prototypes = torch.randn(1, 16, 10), torch.randn(2, 3, 16)
    expected = prototype_similarity(z, prototypes)
    with torch.autocast(z.device.type, torch.bfloat16):
        torch.testing.assert_close(prototype_similarity(z, prototypes), expected, rtol=0, atol=0)


def test_reference_gradient():
    prototypes = torch.randn(3, 2, 5, dtype=torch.float64)
    z = torch.randn(2, 5, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda z: reference.prototype_similarity(z, prototypes)[0], z)


def test_worked_by_hand(backend):
    prototypes = torch.tensor([[[2.0, 0.0], [0.0, 1.0]], [[-1.0, 0.0], [3.0, 4.0]]])
    z = torch.tensor([[[3.0], [0.0]], [[0.0], [-2.0]]])  # (3, 0) and (0, -2)
    similarity, index = prototype_similarity(z, prototypes)
    torch.testing.assert_close(similarity, torch.tensor([[[1.0], [0.6]], [[0.0], [0.0]]]))
    assert index.flatten().tolist() == [0, 1, 0, 0]


def test_backward_allocates_the_gradient_alone(kernel):
    """No gradient of the index, which autograd would fill with zeros."""
    prototypes = make_prototypes(16, 3, 2)
    z = make_embedding(2, (63,), prototypes).requires_grad_()
    similarity, _ = prototype_similarity(z, prototypes)
    upstream = torch.ones_like(similarity)
    with Allocations() as allocations:
        torch.autograd.grad(similarity, z, upstream)
    assert allocations.sizes == [z.untyped_storage().nbytes()]
