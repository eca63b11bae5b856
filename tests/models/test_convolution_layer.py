"""The convolutions of the networks are PyTorch's, and have batch normalisation folded into them as PyTorch's have."""

import pytest
import torch
from torch import nn

from semiseg.models.batch_norm import BatchNormReLU
from semiseg.models.convolution import (
    Convolution2d,
    Convolution3d,
    StridedConvolution3d,
    TransposedConvolution3d,
)
from semiseg.models.folding import fold_batch_norm

PLAIN = {  # PyTorch's layer, the network's, and an image large enough for its kernel
    "2d": (nn.Conv2d, Convolution2d, (2, 16, 32, 35)),
    "3d": (nn.Conv3d, Convolution3d, (1, 16, 12, 14, 15)),
}


def laid_out(axes, channels_last):
    formats = {"2d": torch.channels_last, "3d": torch.channels_last_3d}
    return {"memory_format": formats[axes] if channels_last else torch.contiguous_format}


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("axes", PLAIN)
def test_weights_results_and_gradients_are_those_of_pytorchs_layer(axes, bias, channels_last):
    convolution, layer, shape = PLAIN[axes]
    torch.manual_seed(0)
    plain = convolution(16, 32, kernel_size=3, padding=1, bias=bias)
    torch.manual_seed(0)
    own = layer(16, 32, bias=bias)
    assert own.state_dict().keys() == plain.state_dict().keys()
    assert all(torch.equal(own.state_dict()[key], value) for key, value in plain.state_dict().items())

    image = torch.randn(shape).to(**laid_out(axes, channels_last))
    results = []
    for convolve in (plain, own):
        convolve.to(**laid_out(axes, channels_last))
        x = image.clone().requires_grad_()
        y = convolve(x)
        results.append((y, *torch.autograd.grad(y.square().mean(), (x, *convolve.parameters()))))
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("axes", PLAIN)
def test_a_single_image_of_one_channel_comes_in_the_format_of_the_weight(axes, channels_last):
    _, layer, shape = PLAIN[axes]
    y = layer(1, 16).to(**laid_out(axes, channels_last))(torch.randn(1, 1, *shape[2:]))
    assert y.is_contiguous(**laid_out(axes, channels_last))


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("axes", PLAIN)
def test_a_batch_of_images_has_the_kernel_of_few_channels(axes, channels, convolution_calls):
    """It is contiguous, whatever the format of the weight."""
    convolution, layer, shape = PLAIN[axes]
    x = torch.randn(shape[0], channels, *shape[2:])
    plain = convolution(channels, 16, kernel_size=3, padding=1)
    own = layer(channels, 16)
    own.load_state_dict(plain.state_dict())
    own.to(**laid_out(axes, channels_last=True))
    results = []
    for convolve in (plain, own):
        y = convolve(x)
        results.append((y, *torch.autograd.grad(y.square().mean(), [*convolve.parameters()])))
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-5)
    assert results[1][0].is_contiguous(**laid_out(axes, channels_last=True))
    names = [name for name, _ in convolution_calls if name != "convolution_matrices"]
    assert names == ["convolution_forward", "convolution_weight"]


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("layer", [Convolution3d, StridedConvolution3d, TransposedConvolution3d])
def test_a_single_small_image_stays_in_the_format_of_the_weight(layer, channels_last):
    """PyTorch, which convolves it, gives some such results contiguous, for which the next layer has no kernel."""
    laid_out_so = laid_out("3d", channels_last)
    layer = layer(32, 64).to(**laid_out_so)
    with torch.no_grad():
        assert layer(torch.randn(1, 32, 8, 8, 8).to(**laid_out_so)).is_contiguous(**laid_out_so)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("axes", PLAIN)
def test_batch_norm_folds_into_it(axes, channels_last):
    _, layer, shape = PLAIN[axes]
    torch.manual_seed(0)
    network = nn.Sequential(layer(16, 32), BatchNormReLU(32, negative_slope=0.01))
    x = torch.randn(shape).to(**laid_out(axes, channels_last))
    network(2 * x + 1)  # moves the statistics
    network.to(**laid_out(axes, channels_last)).eval()
    folded = fold_batch_norm(network)
    assert [type(part) for part in folded] == [layer] and folded[0].negative_slope == 0.01
    assert not torch.equal(folded[0].weight, network[0].weight)
    torch.testing.assert_close(folded(x), network(x), rtol=1e-4, atol=1e-5)
