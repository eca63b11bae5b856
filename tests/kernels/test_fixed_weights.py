"""What is kept of a convolution's weight between calls, and for how long."""

import gc

import pytest
import torch
from comparison import in_layout

from semiseg_kernels import convolution, fix_weight, fixed_weights, use_backend
from semiseg_kernels.native.extension import extension


def transformed(calls):
    """The addresses of the weights that were transformed."""
    return [options["weight"] for name, options in calls if name == "convolution_matrices" and options["matrices"]]


def make_inputs(channels=32, sides=(8, 9, 12)):
    x = in_layout(torch.randn(2, channels, *sides), "channels_last")
    return x, torch.randn(16, channels, *[3] * len(sides))


@torch.no_grad()
def convolved(x, weight):
    with use_backend("cpu"):
        return convolution(x, weight)


@pytest.mark.parametrize("channels", [1, 17, 32, 48])
@pytest.mark.parametrize("sides", [(8, 9, 12), (17, 19)])
def test_the_same_bits_from_one_transform(convolution_calls, channels, sides):
    x, weight = make_inputs(channels, sides)
    expected = [convolved(x, weight) for _ in range(2)]
    assert len(transformed(convolution_calls)) == 2
    fix_weight(weight)
    expected += [convolved(x, weight) for _ in range(3)]
    assert len(transformed(convolution_calls)) == 3
    assert all(torch.equal(y, expected[0]) for y in expected)


def test_each_kind_of_tiles_and_the_gradient_have_their_own(convolution_calls):
    """Lines decide on the tiles; the gradient of x takes the taps in reverse."""
    x, weight = make_inputs()
    images = [
        in_layout(x[:, :, :depth, :lines, :voxels], "channels_last")
        for depth, lines, voxels in ((8, 8, 12), (8, 2, 12), (5, 7, 12), (3, 1, 12), (4, 7, 5), (4, 5, 7))
    ]
    expected = [convolved(image, weight) for image in images]
    convolution_calls.clear()
    fix_weight(weight)
    for _ in range(2):
        assert all(
            torch.equal(convolved(image, weight), y) for image, y in zip(images, expected, strict=True)
        )
        assert len(transformed(convolution_calls)) == 3

    x.requires_grad_()
    gradients = []
    for kernel in ("cpu", "reference"):
        with use_backend(kernel):
            gradients += torch.autograd.grad(convolution(x, weight).square().sum(), x)
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-2)
    assert len(transformed(convolution_calls)) == 4


def test_other_weights_are_not_fixed(convolution_calls):
    x, weight = make_inputs()
    fix_weight(weight)
    for _ in range(2):
        assert torch.equal(convolved(x, 2 * weight), 2 * convolved(x, weight))
    assert len(transformed(convolution_calls)) == 3


@pytest.mark.parametrize("channels", [1, 32])
def test_levels_do_not_share(convolution_calls, channels):
    """Their matrices have other numbers of columns next to each other."""
    x, weight = make_inputs(channels)
    fix_weight(weight)
    expected = convolved(x, weight)
    module, levels = extension("cpu"), extension("cpu").levels()
    try:
        for level in levels:
            module.use_level(level)
            torch.testing.assert_close(convolved(x, weight), expected, rtol=1e-4, atol=1e-3)
    finally:
        module.use_level(levels[-1])


def test_a_change_in_place_is_noticed(convolution_calls):
    x, weight = make_inputs()
    fix_weight(weight)
    before = convolved(x, weight)
    weight.neg_()
    for _ in range(2):
        assert torch.equal(convolved(x, weight), -before)
    assert len(transformed(convolution_calls)) == 2


@pytest.mark.parametrize("optimiser", [torch.optim.SGD, torch.optim.AdamW])
def test_training_with_a_fused_optimiser_is_noticed(optimiser):
    x, weight = make_inputs()
    fix_weight(weight)
    convolved(x, weight)
    step = optimiser([weight.requires_grad_()], lr=0.1, fused=True).step
    for _ in range(2):
        with use_backend("cpu"):
            convolution(x, weight).square().mean().backward()
        step()
        assert torch.equal(convolved(x, weight), convolved(x, weight.detach().clone()))
    weight.requires_grad_(False)
    assert torch.equal(convolved(x, weight), convolved(x, weight.clone()))


def test_other_memory_is_noticed(convolution_calls):
    """Also where the memory before would be free for it."""
    x, weight = make_inputs()
    fix_weight(weight)
    for _ in range(3):
        for _ in range(2):
            values = torch.randn(weight.numel())
            torch.nn.utils.vector_to_parameters(values, [weight])
            del values
        for _ in range(2):
            assert torch.equal(convolved(x, weight), convolved(x, weight.clone()))
    assert len(transformed(convolution_calls)) == 3 * (1 + 2)


@pytest.mark.parametrize("axes", [(0, 1), (2, 3)])
def test_another_order_of_the_same_memory_is_noticed(convolution_calls, axes):
    x, weight = make_inputs(16, (8, 9))
    fix_weight(weight)
    convolved(x, weight)
    weight.data = weight.data.transpose(*axes)
    for _ in range(2):
        assert torch.equal(convolved(x, weight), convolved(x, weight.clone()))
    assert len(transformed(convolution_calls)) == 1 + 1 + 2


def test_nothing_is_kept_in_inference_mode(convolution_calls):
    x, weight = make_inputs()
    with torch.inference_mode():
        weight = weight.clone()
        fix_weight(weight)
        before = convolved(x, weight)
        weight.neg_()
        assert torch.equal(convolved(x, weight), -before)


def test_memory_is_free_again_with_the_weight(convolution_calls):
    x, weight = make_inputs()
    gc.collect()
    before = len(fixed_weights._fixed)
    fix_weight(weight)
    convolved(x, weight)
    assert len(fixed_weights._fixed) == before + 1
    del weight
    gc.collect()
    assert len(fixed_weights._fixed) == before


@pytest.mark.parametrize("sides", [(3, 2, 4), (5, 5)])
def test_any_number_of_voxels_is_enough(convolution_calls, sides):
    """Without gradients: the weight's has to be transformed too."""
    x, weight = make_inputs(16, sides)
    with torch.no_grad():
        expected = convolution(x, weight)
        assert transformed(convolution_calls) == []
        fix_weight(weight)
        y = convolution(x, weight)
    assert len(transformed(convolution_calls)) == 1
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
    convolution(x, weight.requires_grad_())
    assert len(transformed(convolution_calls)) == 1


def test_compiled_graphs_do_not_depend_on_it(convolution_calls):
    x, weight = make_inputs(16, (3, 2, 4))
    compiled = torch.compile(convolution, fullgraph=True, backend="eager")
    with torch.no_grad():
        expected = compiled(x, weight)
        fix_weight(weight)
        with torch._dynamo.config.patch(error_on_recompile=True):
            assert torch.equal(compiled(x, weight), expected)
