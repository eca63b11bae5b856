from contextlib import nullcontext

import pytest
import torch

from semiseg_kernels import cluster_mean, momentum_update_, prototype_info_nce, recomputed_results


def test_worked_by_hand(backend):
    prototypes = torch.tensor([[[1.0, -2.0], [5.0, 7.0]]])
    cluster_sum = torch.tensor([[[6.0, 3.0], [0.0, 0.0]]])
    count = torch.tensor([[3.0, 0.0]], dtype=torch.float64)
    result = momentum_update_(prototypes, cluster_sum, count, 0.9)
    assert result is prototypes
    torch.testing.assert_close(prototypes, torch.tensor([[[1.1, -1.7], [5.0, 7.0]]]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(2, 3, 16), (1, 1, 1), (14, 5, 97), (128, 4, 512), (0, 3, 16)])
def test_accuracy(backend, shape, dtype):
    prototypes = torch.randn(shape).to(dtype)
    count = torch.randint(0, 5, shape[:2]).double() * torch.rand(shape[:2], dtype=torch.float64)
    cluster_sum = torch.randn(shape) * 10
    p, mean = prototypes.double(), cluster_sum.double() / count.unsqueeze(2)
    expected = torch.where(count.unsqueeze(2) != 0, 0.99 * p + (1 - 0.99) * mean, p)
    momentum_update_(prototypes, cluster_sum, count, 0.99)
    # Rounded once in float32, and once to the dtype of the prototypes.
    scale = 0.99 * p.abs() + 0.01 * mean.nan_to_num(0, 0, 0).abs()
    assert ((prototypes.double() - expected).abs() <= 2 * torch.finfo(dtype).eps * scale).all()


def test_empty_clusters_keep_their_bits(backend):
    prototypes = torch.randn(4, 3, 16)
    before = prototypes.clone()
    cluster_sum = torch.full((4, 3, 16), torch.nan)
    momentum_update_(prototypes, cluster_sum, torch.zeros(4, 3, dtype=torch.float64), 0.5)
    assert torch.equal(prototypes, before)


def test_counts_beyond_float32(backend):
    prototypes = torch.zeros(1, 1, 1)
    count = torch.full((1, 1), 2**24 + 1, dtype=torch.float64)
    momentum_update_(prototypes, torch.full((1, 1, 1), 2.0**24), count, 0.0)
    torch.testing.assert_close(
        prototypes.item(), 2**24 / (2**24 + 1), rtol=torch.finfo(torch.float32).eps, atol=0
    )


def test_strided_prototypes_are_updated_in_place(backend):
    whole = torch.randn(2, 3, 32)
    before = whole.clone()
    count = torch.ones(2, 3, dtype=torch.float64)
    momentum_update_(whole[:, :, ::2], torch.zeros(2, 3, 16), count, 0.5)
    torch.testing.assert_close(whole[:, :, ::2], before[:, :, ::2] / 2)
    assert torch.equal(whole[:, :, 1::2], before[:, :, 1::2])


def test_moves_towards_the_clusters(backend):
    prototypes = torch.randn(2, 3, 16)
    z, labels = torch.randn(2, 16, 200), torch.randint(0, 2, (2, 200))
    cluster_sum, count = cluster_mean(z, prototypes, labels)
    momentum_update_(prototypes, cluster_sum, count, 0.0)
    torch.testing.assert_close(prototypes, (cluster_sum / count.unsqueeze(2)).float())


@pytest.mark.parametrize("context", [nullcontext, recomputed_results])
def test_a_change_between_forward_and_backward_is_noticed(kernel, context):
    prototypes, z = torch.randn(2, 3, 16), torch.randn(1, 16, 9, requires_grad=True)
    with context():
        loss = prototype_info_nce(z, prototypes)
    momentum_update_(prototypes, torch.ones(2, 3, 16), torch.ones(2, 3, dtype=torch.float64), 0.5)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
