"""What is kept of a convolution's weight between calls, and for how long."""

import gc

import pytest
import torch
from comparison import in_layout

import semiseg_kernels.native.convolution as native
from semiseg_kernels import FixedWeights, available_backends, convolution, use_backend


@pytest.fixture
def transformed(monkeypatch):
    """The weight's address of every transform."""
    if "cpu" not in available_backends():
        pytest.skip("backend 'cpu' is not available here")
    addresses, launch = [], native.launch

    def recorded(backend, name, *arguments, **options):
        if options.get("matrices") and name == "convolution_matrices":
            addresses.append(options["weight"])
        return launch(backend, name, *arguments, **options)

    monkeypatch.setattr(native, "launch", recorded)
    return addresses


def make_inputs(channels=32, sides=(8, 9, 12)):
    x = in_layout(torch.randn(2, channels, *sides), "channels_last")
    return x, torch.randn(16, channels, *[3] * len(sides))


@torch.no_grad()
def convolved(x, weight):
    with use_backend("cpu"):
        return convolution(x, weight)


@pytest.mark.parametrize("channels", [1, 17, 32, 48])
@pytest.mark.parametrize("sides", [(8, 9, 12), (17, 19)])
def test_the_same_bits_from_one_transform(transformed, channels, sides):
    x, weight = make_inputs(channels, sides)
    expected = convolved(x, weight)
    transformed.clear()
    fixed_weights = FixedWeights()
    for _ in range(3):
        with fixed_weights:
            assert torch.equal(convolved(x, weight), expected)
    assert len(transformed) == 1
    convolved(x, weight)
    assert len(transformed) == 2  # outside nothing is kept


def test_other_sides_and_the_gradient_have_their_own(transformed):
    """The sides decide on the tiles; the gradient of x takes the taps in reverse."""
    x, weight = make_inputs()
    flat = in_layout(x[:, :, :, :2], "channels_last")
    expected = [convolved(image, weight) for image in (x, flat)]
    transformed.clear()
    with FixedWeights():
        for _ in range(2):
            for image, y in zip((x, flat), expected, strict=True):
                assert torch.equal(convolved(image, weight), y)
        assert len(transformed) == 2
        with use_backend("cpu"):
            needs_gradient = x.requires_grad_()
            y = convolution(needs_gradient, weight)
            (gradient,) = torch.autograd.grad(y.sum(), needs_gradient)
    with use_backend("reference"):
        (by_pytorch,) = torch.autograd.grad(convolution(needs_gradient, weight).sum(), needs_gradient)
    torch.testing.assert_close(gradient, by_pytorch, rtol=1e-4, atol=1e-3)
    assert len(transformed) == 3


def test_weights_of_the_same_values_are_told_apart(transformed):
    x, weight = make_inputs()
    with FixedWeights():
        for _ in range(2):
            assert torch.equal(convolved(x, 2 * weight), 2 * convolved(x, weight))
    assert len(transformed) == 3  # a product is another weight every time


def test_a_change_in_place_is_noticed():
    if "cpu" not in available_backends():
        pytest.skip("backend 'cpu' is not available here")
    x, weight = make_inputs()
    fixed_weights = FixedWeights()
    with fixed_weights:
        before = convolved(x, weight)
    weight.neg_()
    with fixed_weights:
        assert torch.equal(convolved(x, weight), -before)


def test_nothing_is_kept_in_inference_mode(transformed):
    """Changes of its tensors are not counted."""
    x, weight = make_inputs()
    with FixedWeights(), torch.inference_mode():
        weight = weight.clone()
        before = convolved(x, weight)
        weight.neg_()
        assert torch.equal(convolved(x, weight), -before)
    assert len(transformed) == 2


def test_memory_is_free_again_with_the_weight(transformed):
    x, weight = make_inputs()
    fixed_weights = FixedWeights()
    with fixed_weights:
        convolved(x, weight)
    assert len(fixed_weights._made) == 1
    del weight
    gc.collect()
    assert len(fixed_weights._made) == 0


def test_nested_and_left_by_an_error(transformed):
    x, weight = make_inputs()
    outer = FixedWeights()
    with outer:
        convolved(x, weight)
        with pytest.raises(KeyError), FixedWeights(), outer:
            convolved(x, weight)
            raise KeyError
        assert len(transformed) == 1
        with FixedWeights():
            convolved(x, weight)
        convolved(x, weight)
    assert len(transformed) == 2
    convolved(x, weight)
    assert len(transformed) == 3


@pytest.mark.parametrize("sides", [(3, 2, 4), (5, 5)])
def test_any_number_of_voxels_is_enough(transformed, sides):
    """Without gradients: the weight's has to be transformed too."""
    x, weight = make_inputs(16, sides)
    with torch.no_grad():
        convolution(x, weight)
        assert transformed == []
        with FixedWeights():
            y = convolution(x, weight)
    assert len(transformed) == 1
    with FixedWeights():
        expected = convolution(x, weight.requires_grad_())
    assert len(transformed) == 1
    torch.testing.assert_close(y, expected.detach(), rtol=1e-4, atol=1e-4)
