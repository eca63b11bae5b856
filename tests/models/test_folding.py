"""Networks with batch normalisation folded into their convolutions compute what they did before."""

import copy

import pytest
import torch
from torch import nn

from semiseg.models import TwoDecoderUNet, TwoDecoderVNet, TwoNetworks, UNet, VNet, VoxelPrompt
from semiseg.models.batch_norm import BatchNormReLU
from semiseg.models.folding import fold_batch_norm

UNET = {"filters": (4, 8, 16), "dropout": (0.1, 0.2, 0.3)}


def prompt(width: int, dimensions: int) -> VoxelPrompt:
    return VoxelPrompt(torch.randn(2, 8), width, dimensions=dimensions, prompt_width=8)


NETWORKS = {
    "vnet": lambda: VNet(filters=4),
    "vnet_on_kernels": lambda: VNet(filters=16),  # as many channels as the kernels of convolutions want
    "unet": lambda: UNet(num_classes=2, **UNET),
    "two_decoder_vnet": lambda: TwoDecoderVNet(filters=4, prompt=prompt(64, 3)),
    "two_decoder_unet": lambda: TwoDecoderUNet(num_classes=2, prompt=prompt(16, 2), **UNET),
    "two_networks": lambda: TwoNetworks(VNet(filters=4), VNet(filters=4)),
}
KEPT = {"two_decoder_vnet": 1, "two_decoder_unet": 1}  # behind the prompt, which is no convolution layer


def trained_network(name: str) -> nn.Module:
    """With statistics, scales and shifts that are not those of the start."""
    torch.manual_seed(0)
    network = NETWORKS[name]()
    for layer in network.modules():
        if isinstance(layer, BatchNormReLU):
            layer.running_mean.normal_()
            layer.running_var.uniform_(0.5, 2.0)
            nn.init.uniform_(layer.weight, -1.5, 1.5)
            nn.init.normal_(layer.bias)
    return network


def image(name: str) -> torch.Tensor:
    return torch.randn(2, 1, 16, 32) if "unet" in name else torch.randn(2, 1, 16, 32, 16)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", NETWORKS)
def test_equals_the_network(name, dtype, channels_last):
    x = image(name).to(dtype)
    network = trained_network(name).to(dtype)
    memory_format = torch.contiguous_format
    if channels_last:
        memory_format = torch.channels_last if x.ndim == 4 else torch.channels_last_3d
        network.to(memory_format=memory_format)
    folded = fold_batch_norm(network)
    assert not folded.training and network.training
    assert not any(parameter.requires_grad for parameter in folded.parameters())  # else no weight is fixed
    assert sum(isinstance(layer, BatchNormReLU) for layer in folded.modules()) == KEPT.get(name, 0)
    for layer in folded.modules():
        if isinstance(layer, nn.Conv2d | nn.Conv3d | nn.ConvTranspose2d | nn.ConvTranspose3d):
            assert layer.weight.dtype == dtype and layer.weight.is_contiguous(memory_format=memory_format)
    with torch.no_grad():
        for result, expected in zip(folded(x), network.eval()(x), strict=True):
            tolerance = 1e-4 if dtype == torch.float32 else 1e-11
            torch.testing.assert_close(result, expected, rtol=0, atol=tolerance * float(expected.abs().max()))


@pytest.mark.parametrize("name", ["vnet", "two_decoder_unet"])
def test_leaves_the_original_as_it_is(name):
    network, x = trained_network(name), image(name)
    before = copy.deepcopy(network.state_dict())
    folded = fold_batch_norm(network)
    with torch.no_grad():
        expected = folded(x)[0]
        assert network.state_dict().keys() == before.keys()
        for key, value in network.state_dict().items():
            assert torch.equal(value, before[key]), key
        for parameter in network.parameters():  # as training would
            parameter.add_(1.0)
        assert torch.equal(folded(x)[0], expected)


def test_bfloat16_is_as_near_to_float32_as_without_folding():
    network, x = trained_network("vnet").eval(), image("vnet")
    with torch.no_grad():
        exact = network(x)[0]
        with torch.autocast("cpu", torch.bfloat16):
            errors = [
                (form(x)[0] - exact).square().mean().sqrt() for form in (network, fold_batch_norm(network))
            ]
    assert errors[0] > 0
    assert errors[1] < 1.25 * errors[0]


def test_a_folded_network_leaves_relu_and_skip_connections_to_the_kernels(convolution_calls):
    network = fold_batch_norm(trained_network("vnet_on_kernels").to(memory_format=torch.channels_last_3d))
    with torch.no_grad():
        network(image("vnet_on_kernels"))
    fused = [
        name for name, options in convolution_calls if options.get("negative_slope") == 0 and options.get("added")
    ]
    assert "strided_convolution_transposed" in fused
