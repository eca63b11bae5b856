import pytest
import torch
from torch import nn

from semiseg.models.dropout import DRAWN_TOGETHER, Dropout

DTYPES = (torch.float32, torch.bfloat16, torch.float64)


@pytest.mark.parametrize("probability", [0.05, 0.3, 0.5])
def test_each_value_is_dropped_as_often_as_it_should(probability):
    """Also of those that come from the same random bits, alone and in pairs."""
    count = 400_000
    dropped = (Dropout(probability)(torch.ones(count)) == 0).view(-1, DRAWN_TOGETHER).double()
    deviation = (probability * (1 - probability) * DRAWN_TOGETHER / count) ** 0.5
    assert (dropped.mean(dim=0) - probability).abs().max() < 5 * deviation
    covariance = torch.cov(dropped.T) - torch.diag(torch.cov(dropped.T).diagonal())
    assert covariance.abs().max() < 5 * deviation


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("shape", [(3, 5, 7, 9), (1, 1, 1, 1), (0, 4, 8, 8)])
def test_what_is_left_is_scaled_and_so_is_its_gradient(shape, memory_format, dtype):
    x = torch.rand(shape).add(1).to(dtype, memory_format=memory_format).requires_grad_()
    y = Dropout(0.25)(x)
    assert y.dtype == dtype and (y.stride() == x.stride() or not len(x))
    kept = y != 0
    torch.testing.assert_close(y, torch.where(kept, x / 0.75, 0))
    (gradient,) = torch.autograd.grad(y, x, x.detach())
    torch.testing.assert_close(gradient, y)


def test_a_second_derivative_is_refused():
    x = torch.randn(100, requires_grad=True)
    (gradient,) = torch.autograd.grad(Dropout(0.5)(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="Dropout has no second derivatives"):
        gradient.sum().backward()


def test_the_generator_decides():
    x, dropout = torch.ones(1000), Dropout(0.5)
    torch.manual_seed(1)
    first, second = dropout(x), dropout(x)
    torch.manual_seed(1)
    assert torch.equal(dropout(x), first) and not torch.equal(first, second)


def test_nothing_is_dropped_in_evaluation_or_at_0_and_all_at_1():
    x = torch.randn(100)
    for dropout in (Dropout(0.4).eval(), Dropout(0.0)):
        assert torch.equal(dropout(x), x)
    assert torch.equal(Dropout(1.0)(x), torch.zeros(100))


def test_is_pytorchs_module():
    assert isinstance(Dropout(0.2), nn.Dropout) and repr(Dropout(0.2)) == "Dropout(p=0.2, inplace=False)"
