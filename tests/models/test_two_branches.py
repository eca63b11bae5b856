"""Two decoders on one encoder: what runs when; the second decoder; the voxel-wise prompt by its formula."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from semiseg.models import TWO_DECODERS, TwoNetworks, UNet, VNet, VoxelPrompt
from semiseg.models.dropout import Dropout
from semiseg.models.unet import UNetDecoder
from semiseg.models.vnet import VNetDecoder

UNET_FILTERS = (4, 8, 16, 32, 64)
DIMENSIONS = {"vnet": 3, "unet": 2}


def two_decoders(name, **options):
    sizes = (
        {"filters": 4, "dropout": 0.0} if name == "vnet" else {"filters": UNET_FILTERS, "dropout": (0.0,) * 5}
    )
    return TWO_DECODERS[name](num_classes=3, **sizes, **options)


def images(name, batch=2):
    return torch.randn(batch, 1, *((16, 32, 16) if name == "vnet" else (32, 48)))


def voxel_prompt(name, **options):
    text = torch.randn(3, 12)
    return VoxelPrompt(text, 64, dimensions=DIMENSIONS[name], prompt_width=10, **options)


@pytest.mark.parametrize("name", ["vnet", "unet"])
def test_shapes(name):
    network = two_decoders(name, prompt=voxel_prompt(name))
    x = images(name)
    logits, embedding = network(x)
    assert logits.shape == (2, 3, *x.shape[2:]) and embedding.shape == (2, 4, *x.shape[2:])
    branches = network.branches(x)
    assert branches.logits_a.shape == branches.logits_b.shape == logits.shape
    assert branches.bottleneck.shape == (2, 64, *(side // 16 for side in x.shape[2:]))
    network.eval()
    torch.testing.assert_close(network(x)[0], network.branches(x).logits_a)


@pytest.mark.parametrize("name", ["vnet", "unet"])
def test_decoder_a_is_the_plain_network_s(name):
    network = two_decoders(name).eval()
    plain = VNet(num_classes=3, filters=4) if name == "vnet" else UNet(num_classes=3, filters=UNET_FILTERS)
    state = {key.removeprefix("decoding_a."): tensor for key, tensor in network.state_dict().items()}
    plain.eval().load_state_dict({key: state[key] for key in plain.state_dict()})
    x = images(name)
    for output, expected in zip(network(x), plain(x), strict=True):
        torch.testing.assert_close(output, expected)


@pytest.mark.parametrize("name", ["vnet", "unet"])
def test_inference_runs_encoder_prompt_and_decoder_a_only(name):
    network = two_decoders(name, prompt=voxel_prompt(name)).eval()
    x = images(name)
    expected = network(x)[0]
    ran = set()
    for part, module in network.named_children():
        module.register_forward_hook(lambda *_, part=part: ran.add(part))
    network(x)
    assert ran == {"encoder", "prompt", "decoding_a"}
    del network.decoding_b
    assert torch.equal(network(x)[0], expected)


@pytest.mark.parametrize("name", ["vnet", "unet"])
def test_the_second_decoder_interpolates_and_convolves(name):
    decoder = two_decoders(name).decoding_b.decoder
    assert not [m for m in decoder.modules() if isinstance(m, nn.ConvTranspose2d | nn.ConvTranspose3d)]
    up = decoder.up[0]
    x = torch.randn(2, 64, *(3,) * DIMENSIONS[name])
    linear = "trilinear" if name == "vnet" else "bilinear"
    expected = F.interpolate(x, scale_factor=2, mode=linear)
    if name == "vnet":
        expected = F.conv3d(expected, up[1].weight, padding=1)
        expected = F.batch_norm(expected, None, None, up[2].weight, up[2].bias, training=True).relu()
    else:
        expected = F.conv2d(expected, up[1].weight, up[1].bias, padding=1)
    torch.testing.assert_close(up(x), expected)


def test_dropout():
    """Of the U-Net only the encoder has it."""
    unet, vnet = TWO_DECODERS["unet"](filters=UNET_FILTERS), TWO_DECODERS["vnet"](filters=4)
    assert [layer.p for layer in unet.encoder.modules() if isinstance(layer, Dropout)] == [0.05, 0.1, 0.2, 0.3, 0.5]
    for decoding in (unet.decoding_a, unet.decoding_b):
        assert decoding.dropout.probability == 0
        assert not any(layer.p for layer in decoding.modules() if isinstance(layer, Dropout))
    for part in (vnet.encoder, vnet.decoding_a, vnet.decoding_b):
        assert part.dropout.probability == 0.5
    vnet = TWO_DECODERS["vnet"](filters=4, dropout=0.25)
    assert [part.dropout.probability for part in (vnet.encoder, vnet.decoding_a, vnet.decoding_b)] == [0.25] * 3


@pytest.mark.parametrize("name", ["vnet", "unet"])
def test_gradient_of_both_decoders_reaches_every_weight(name):
    network = two_decoders(name, prompt=voxel_prompt(name))
    branches = network.branches(images(name))
    (branches.logits_a.square().sum() + branches.logits_b.square().sum()).backward()
    for key, parameter in network.named_parameters():
        assert parameter.grad.isfinite().all() and parameter.grad.any(), key


def test_two_networks_share_nothing():
    network = TwoNetworks(*(UNet(num_classes=3, filters=UNET_FILTERS) for _ in range(2))).eval()
    x = images("unet")
    branches = network.branches(x)
    assert torch.equal(branches.logits_a, network.network_a(x)[0])
    assert torch.equal(branches.logits_b, network.network_b(x)[0])
    assert torch.equal(branches.logits_a, network(x)[0]) and branches.bottleneck is None
    assert not torch.allclose(branches.logits_a, branches.logits_b)


@pytest.mark.parametrize("decoder", [VNetDecoder, UNetDecoder])
def test_unknown_upsampling(decoder):
    with pytest.raises(ValueError, match="upsampling is 'nearest', accepted are 'transposed', 'linear'"):
        decoder(upsampling="nearest")


@pytest.mark.parametrize("name", ["vnet", "unet"])
@pytest.mark.parametrize("kernel", [1, 3])
def test_prompt_is_equations_1_to_3(name, kernel):
    prompt = voxel_prompt(name, fusion_kernel=kernel, controller_widths=(7, 5)).double()
    for parameter in prompt.parameters():
        nn.init.normal_(parameter, std=0.3)
    convolution = F.conv3d if name == "vnet" else F.conv2d
    features = torch.randn(2, 64, *(3, 5, 2)[: DIMENSIONS[name]], dtype=torch.float64)

    def normalised(x, layer):
        return F.leaky_relu(F.batch_norm(x, None, None, layer.weight, layer.bias, training=True), 0.01)

    local, normalization, hidden, _, last = prompt.controller
    x = normalised(convolution(features, local.weight, padding=1), normalization)
    x = F.gelu(torch.einsum("bc...,oc->bo...", x, hidden.weight.flatten(1)) + bias_map(hidden))
    x = torch.einsum("bc...,oc->bo...", x, last.weight.flatten(1)) + bias_map(last)
    semantic = x.exp() / x.exp().sum(1, keepdim=True)
    text = prompt.text @ prompt.text_projection.weight.T + prompt.text_projection.bias
    prompts = sum(semantic[:, c : c + 1] * text[c].reshape(1, -1, *[1] * DIMENSIONS[name]) for c in range(3))
    fused = convolution(torch.cat([features, prompts], 1), prompt.fusion.weight, padding=kernel // 2)
    torch.testing.assert_close(prompt(features), normalised(fused, prompt.activation))


def bias_map(layer):
    return layer.bias.reshape(1, -1, *[1] * (layer.weight.dim() - 2))


def test_a_prompt_in_bfloat16_and_channels_last():
    network = two_decoders("vnet", prompt=voxel_prompt("vnet")).to(memory_format=torch.channels_last_3d)
    x = images("vnet", batch=8)
    expected = network.branches(x).bottleneck
    with torch.autocast("cpu", torch.bfloat16):
        branches = network.branches(x)
    assert (branches.logits_a.dtype, branches.bottleneck.dtype) == (torch.float32, torch.bfloat16)
    assert (branches.bottleneck.float() - expected).norm() < 0.25 * expected.norm()
    (branches.logits_a.float().square().mean() + branches.logits_b.float().square().mean()).backward()
    # Not whether they are finite: on volumes this small PyTorch's own weight gradients in bfloat16 may hold NaN.
    assert all(parameter.grad is not None for parameter in network.parameters())
