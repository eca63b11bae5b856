"""Parameters and multiply-adds against counts made by hand."""

import torch
from torch import nn

from semiseg.config import load_config
from semiseg.engine.cost import method_cost
from semiseg.engine.trainer import build_method
from semiseg.text import random_text

CPU = torch.device("cpu")


def counted_by_hooks(network: nn.Module, image: torch.Tensor) -> int:
    total = 0

    def count(layer, inputs, output):
        nonlocal total
        transposed = isinstance(layer, nn.ConvTranspose2d | nn.ConvTranspose3d)
        taps = layer.weight[0].numel()  # a transposed convolution's weight is [in, out, *k], another's [out, in, *k]
        total += (inputs[0] if transposed else output).numel() * taps

    for layer in network.modules():
        if isinstance(layer, nn.Conv2d | nn.Conv3d | nn.ConvTranspose2d | nn.ConvTranspose3d):
            layer.register_forward_hook(count)
    network.eval()(image)
    return total


def test_a_plain_network():
    config = load_config("phantom_supervised", ["network.filters=[2]"])
    method = build_method(config, 3, CPU)
    cost = method_cost(method, (32, 32, 16))
    parameters = sum(parameter.numel() for parameter in method.network.parameters())
    multiply_adds = counted_by_hooks(method.network, torch.randn(1, 1, 32, 32, 16))
    assert cost["inference"] == {"parameters": parameters, "multiply_adds": multiply_adds}
    assert cost["training"] == cost["inference"]


def test_prompt_second_decoder_and_projection_head():
    options = [
        "network.filters=[2]", "method.prompt_width=8", "method.text_width=6", "method.controller_widths=[12, 5]",
        "method.fusion_kernel=5",
    ]  # fmt: skip
    costs = {}
    for prompt in ("true", "false"):
        for consistency in ("true", "false"):
            switches = [f"method.voxel_prompt={prompt}", f"method.text_consistency={consistency}"]
            config = load_config("phantom_vclipseg", [*options, *switches])
            method = build_method(config, 3, CPU, random_text(3, 6, 0))
            costs[prompt, consistency] = method_cost(method, (32, 32, 16))
    plain = build_method(load_config("phantom_supervised", options[:1]), 3, CPU)
    assert costs["false", "true"]["inference"] == method_cost(plain, (32, 32, 16))["inference"]

    def difference(with_it, without_it, when):
        return {key: with_it[when][key] - without_it[when][key] for key in with_it[when]}

    # The bottleneck has 2 x 2 x 1 voxels of 32 channels; the text of 3 classes is projected 6 -> 8 and folded
    # into 32 x 125 taps.
    projection, fold = 3 * 6 * 8, 3 * 8 * 32 * 125
    voxels = 4 * (32 * 12 * 27 + 12 * 5 + 5 * 3 + (32 + 3) * 32 * 125)
    parameters = (6 * 8 + 8) + (32 * 12 * 27 + 2 * 12 + 12 * 5 + 5 + 5 * 3 + 3) + (40 * 32 * 125 + 2 * 32)
    for when in ("inference", "training"):
        assert difference(costs["true", "false"], costs["false", "false"], when) == {
            "parameters": parameters,
            "multiply_adds": projection + fold + voxels,
        }
    head = difference(costs["true", "true"], costs["true", "false"], "training")
    assert head == {"parameters": 32 * 32 + 32 + 32 * 6 + 6, "multiply_adds": 4 * (32 * 32 + 32 * 6)}
    assert costs["true", "true"]["inference"] == costs["true", "false"]["inference"]
    assert (
        costs["true", "true"]["training"]["multiply_adds"]
        > 2 * costs["true", "true"]["inference"]["multiply_adds"]
    )
