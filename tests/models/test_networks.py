"""V-Net and U-Net: shapes, sizes, what the embedding is, gradients, memory formats."""

import pytest
import torch
from torch import nn

from semiseg.engine.precision import UNSAFE_FIRST_SIDES
from semiseg.models import UNet, VNet, build_network
from semiseg.models.dropout import Dropout
from semiseg.models.initialisation import initialise

SMALL_UNET = (4, 8, 16, 32, 64)


def small_network(name: str, **options) -> nn.Module:
    return build_network(name, num_classes=3, filters=4 if name == "vnet" else SMALL_UNET, **options)


def images(name: str, batch: int = 2, first_side: int = 16) -> torch.Tensor:  # first_side: of volumes
    return torch.randn(batch, 1, *((first_side, 32, 16) if name == "vnet" else (32, 48)))


def channels_last(name: str) -> torch.memory_format:
    return torch.channels_last_3d if name == "vnet" else torch.channels_last


def no_dropout(name: str) -> dict:
    return {"dropout": 0.0 if name == "vnet" else (0.0,) * len(SMALL_UNET)}


def dropped_channels(x: torch.Tensor) -> torch.Tensor:
    return (x == 0).flatten(2).all(dim=2)


def parameters(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def test_sizes_of_the_published_networks():
    # UA-MT's V-Net has 9.44 million parameters. Convolutions ahead of batch normalisation have no bias here.
    assert parameters(VNet(num_classes=2)) == 9_446_066
    assert parameters(UNet(num_classes=4)) == 1_942_340
    for network, width in ((VNet(), 16), (UNet(), 16)):
        assert network.classifier.in_channels == width
        assert set(network.classifier.kernel_size) == {1}


@pytest.mark.parametrize("name", ["vnet", "unet"])
def test_shapes(name):
    network = small_network(name)
    x = images(name)
    logits, embedding = network(x)
    assert logits.shape == (2, 3, *x.shape[2:])
    assert embedding.shape == (2, network.classifier.in_channels, *x.shape[2:])


def test_embedding_is_the_classifiers_input_before_its_dropout():
    x = images("vnet", batch=16)
    for after_dropout in (False, True):
        network = small_network("vnet", embedding_after_dropout=after_dropout, dropout=0.5)
        logits, embedding = network(x)
        assert dropped_channels(embedding).any() == after_dropout
        # Where the embedding is the classifier's input, the classifier makes the logits of it.
        assert torch.allclose(network.classifier(embedding), logits, atol=1e-5) == after_dropout
        logits, embedding = network.eval()(x)
        torch.testing.assert_close(network.classifier(embedding), logits)


def test_the_unets_classifier_has_no_dropout():
    network = small_network("unet")
    logits, embedding = network(images("unet"))
    torch.testing.assert_close(network.classifier(embedding), logits)


def test_dropout_of_the_vnet():
    network = small_network("vnet", dropout=0.5)
    x = images("vnet", batch=16)
    bottleneck = network.encoder(x)[-1]
    assert 0.3 < dropped_channels(bottleneck).float().mean() < 0.7
    assert not dropped_channels(network.encoder(x)[0]).any()
    network = small_network("vnet", dropout=0.0)
    torch.testing.assert_close(network(x)[0], network(x)[0])


def test_dropout_of_the_unet():
    def probabilities(part):
        return [layer.p for layer in part.modules() if isinstance(layer, Dropout)]

    assert probabilities(UNet().encoder) == [0.05, 0.1, 0.2, 0.3, 0.5]
    network = UNet(dropout=(0.4, 0.3, 0.2, 0.1, 0.0))
    assert probabilities(network.encoder) == [0.4, 0.3, 0.2, 0.1, 0.0]
    assert not any(probabilities(network.decoder))


@pytest.mark.parametrize("name", ["vnet", "unet"])
@pytest.mark.parametrize("output", [0, 1])
def test_gradient_reaches_every_weight(name, output):
    network = small_network(name)
    network(images(name))[output].square().sum().backward()
    without = {key for key, parameter in network.named_parameters() if parameter.grad is None}
    assert without == (set() if output == 0 else {"classifier.weight", "classifier.bias"})
    for key, parameter in network.named_parameters():
        if key not in without:
            assert parameter.grad.isfinite().all() and parameter.grad.any(), key


@pytest.mark.parametrize("name", ["vnet", "unet"])
def test_channels_last_gives_the_same(name):
    network = small_network(name, **no_dropout(name)).double()  # exact enough that no ReLU flips
    x = images(name).double()
    results = []
    for memory_format in (torch.contiguous_format, channels_last(name)):
        network.to(memory_format=memory_format)
        network.zero_grad()
        logits, embedding = network(x.to(memory_format=memory_format))
        (logits.sin().sum() + embedding.cos().sum()).backward()
        results.append((logits, embedding, torch.cat([p.grad.flatten() for p in network.parameters()])))
    for contiguous, last in zip(*results, strict=True):
        assert (contiguous - last).norm() < 1e-9 * contiguous.norm()


@pytest.mark.parametrize("name", ["vnet", "unet"])
def test_embedding_has_the_memory_format_of_the_weights(name):
    network = small_network(name).to(memory_format=channels_last(name))
    _, embedding = network(images(name))
    assert embedding.is_contiguous(memory_format=channels_last(name))
    embedding.sum().backward()


@pytest.mark.parametrize("name", ["vnet", "unet"])
def test_bfloat16_autocast(name):
    network = small_network(name, **no_dropout(name))
    network.to(memory_format=channels_last(name))
    # Batch normalisation of few values would magnify rounding; other sides' gradients can hold what was never written.
    first_side = next(side for side in range(16, 64, 16) if side not in UNSAFE_FIRST_SIDES)
    x = images(name, batch=8, first_side=first_side)
    expected, _ = network(x)
    with torch.autocast("cpu", torch.bfloat16):
        logits, embedding = network(x)
    assert (logits.dtype, embedding.dtype) == (torch.float32, torch.bfloat16)
    logits.float().square().mean().backward()
    assert all(parameter.grad.isfinite().all() for parameter in network.parameters())
    assert (logits.float() - expected).norm() < 0.25 * expected.norm()


@pytest.mark.parametrize("name", ["vnet", "unet"])
def test_features_are_let_go_where_they_are_used(name):
    network = small_network(name)
    features = network.encoder(images(name))
    assert len(features) == 5
    network.decoder(features)
    assert not features


def test_initial_weights():
    with torch.random.fork_rng():
        seed = torch.seed()
        first = VNet(num_classes=2)
        torch.manual_seed(seed)
        again = VNet(num_classes=2)
    for a, b in zip(first.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)
    weight = first.encoder.stages[4][0].weight
    assert weight.var().item() == pytest.approx(1 / (3 * 256 * 27), rel=0.02)
    initialise(first, "he")
    assert weight.var().item() == pytest.approx(2 / (256 * 27), rel=0.02)
    assert first.classifier.weight.any() and not first.classifier.bias.any()


@pytest.mark.parametrize(
    "name, shape", [("vnet", (32, 40, 16)), ("vnet", (112, 112, 79)), ("unet", (24, 32))]
)
def test_sides_that_cannot_be_halved_four_times(name, shape):
    with pytest.raises(ValueError, match="accepted are multiples of 16"):
        small_network(name)(torch.randn(1, 1, *shape))


def test_bad_arguments():
    with pytest.raises(ValueError, match="name is 'resnet', accepted are 'vnet', 'unet'"):
        build_network("resnet")
    with pytest.raises(ValueError, match="dropout has 2 values"):
        UNet(dropout=(0.1, 0.2))
