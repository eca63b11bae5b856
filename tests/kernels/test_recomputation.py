import gc

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.functional import conv3d

from semiseg_kernels import (
    batch_norm_relu,
    convolution,
    linear_upsampling,
    recomputable,
    recomputed_results,
    use_backend,
)


def layers(x, weights, consumer):
    """Two layers of batch normalisation and convolution; the results, and references to what batch normalisation gave."""
    kept = []
    for weight in weights:
        x = batch_norm_relu(x, *(torch.ones(16), torch.zeros(16)), *(torch.zeros(16), torch.ones(16)))
        kept.append(StorageWeakRef(x.untyped_storage()))
        x = consumer(x, weight)
    return x, kept


@pytest.fixture
def inputs():
    x = torch.randn(2, 16, 6, 5, 4)
    return x.requires_grad_(), [torch.randn(16, 16, 3, 3, 3).requires_grad_() for _ in range(2)]


CONSUMERS = {
    "PyTorch's": lambda x, weight: conv3d(x, weight, padding=1),
    "own": convolution,
    "changed in place": lambda x, weight: conv3d(x.add_(1.0), weight, padding=1),
    "a part": lambda x, weight: conv3d(x[:, :8], weight[:, :8], padding=1),
}
FREED = ("PyTorch's", "own")


def skip_without_convolution(kernel, consumer):
    if consumer == "own" and kernel != "cpu":
        pytest.skip(f"{kernel} does not have convolution")


@pytest.mark.parametrize("consumer", CONSUMERS)
def test_the_same_gradients_to_the_bit(kernel, inputs, consumer):
    skip_without_convolution(kernel, consumer)
    x, weights = inputs
    with use_backend(kernel):
        y, _ = layers(x, weights, CONSUMERS[consumer])
        expected = torch.autograd.grad(y.square().mean(), (x, *weights))
        with recomputed_results():
            y, _ = layers(x, weights, CONSUMERS[consumer])
        actual = torch.autograd.grad(y.square().mean(), (x, *weights))
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@pytest.mark.parametrize("consumer", CONSUMERS)
def test_results_are_not_kept(kernel, inputs, consumer):
    skip_without_convolution(kernel, consumer)
    with use_backend(kernel):
        with recomputed_results():
            y, kept = layers(*inputs, CONSUMERS[consumer])
        gc.collect()  # Triton's interpreter leaves cycles
        # The first one's, as Triton's interpreter holds on to what it was called with last.
        assert kept[0].expired() == (consumer in FREED)
        y, kept = layers(*inputs, CONSUMERS[consumer])
        assert not any(reference.expired() for reference in kept)
    assert y.requires_grad  # the graph was there all along


def skips(inputs, combine):
    """The two layers' results, doubled and added, before a last convolution."""
    x, (first, second) = inputs
    parameters = [value(16) for value in (torch.ones, torch.zeros, torch.zeros, torch.ones)]
    y = batch_norm_relu(x, *parameters)
    z = batch_norm_relu(conv3d(y, first, padding=1), *parameters)
    total = combine(torch.add, combine(linear_upsampling, y), combine(linear_upsampling, z))
    kept = StorageWeakRef(total.untyped_storage())
    return conv3d(total, second, padding=1), kept


@pytest.mark.parametrize("is_kept", [False, True], ids=["recomputed", "reference"])
def test_what_is_made_of_results_is_not_kept_either(inputs, is_kept):
    (x, weights), backend = inputs, "reference" if is_kept else "auto"
    with use_backend(backend):
        y, _ = skips(inputs, lambda function, *given: function(*given))
        expected = torch.autograd.grad(y.square().mean(), (x, *weights))
        with recomputed_results():
            y, kept = skips(inputs, recomputable)
        assert kept.expired() != is_kept
        actual = torch.autograd.grad(y.square().mean(), (x, *weights))
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def test_autocast_is_that_of_the_forward_pass(inputs):
    x, (first, second) = inputs
    parameters = [value(16) for value in (torch.ones, torch.zeros, torch.zeros, torch.ones)]

    def layers_with(combine):
        y = batch_norm_relu(x, *parameters)
        z = combine(lambda y: conv3d(y, first.detach(), padding=1), y)
        return conv3d(z, second, padding=1), z

    with torch.autocast("cpu", torch.bfloat16):
        y, z = layers_with(lambda function, given: function(given))
        with recomputed_results():
            again, _ = layers_with(recomputable)
    assert z.dtype == torch.bfloat16
    expected, actual = (torch.autograd.grad(y.float().square().mean(), (x, second)) for y in (y, again))
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@pytest.mark.parametrize("changed", ["input", "weight"])
def test_a_change_between_forward_and_backward_is_noticed(kernel, inputs, changed):
    """Also of what a result is computed again from, though batch normalisation itself is not differentiated."""
    x, (weight, _) = inputs
    z = x.detach()
    scale = torch.ones(16, requires_grad=True)
    with use_backend(kernel), recomputed_results():
        y = batch_norm_relu(z, scale, *(torch.zeros(16), torch.zeros(16), torch.ones(16)))
        loss = conv3d(y, weight, padding=1).square().mean()
    with torch.no_grad():
        (z if changed == "input" else weight).add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(loss, weight if changed == "input" else scale)


def test_the_reference_offers_nothing(inputs):
    with use_backend("reference"), recomputed_results():
        y, kept = layers(*inputs, CONSUMERS["PyTorch's"])
    assert y.requires_grad and not any(reference.expired() for reference in kept)
