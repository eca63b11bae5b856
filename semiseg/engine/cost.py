"""What a method's networks cost: parameters and multiply-adds."""

import copy
from collections.abc import Sequence

import torch
from torch.utils.flop_counter import FlopCounterMode

from semiseg.methods import Method


def method_cost(
    method: Method,
    patch_size: Sequence[int],
    channels: int = 1,  # of an image
) -> dict[str, dict[str, int]]:
    """Parameters and multiply-adds of one patch's forward pass, at inference and in training.

    Multiply-adds are those of convolutions and matrix products; parameters are those the outputs depend on.
    Nothing is computed and no memory used: the passes run on PyTorch's meta device.
    """
    method = copy.deepcopy(method).to("meta").eval()
    image = torch.empty(1, channels, *patch_size, device="meta")
    passes = {
        "inference": lambda: method.network(image)[:1],
        "training": lambda: method.training_forward(image),
    }
    parameters = [parameter for parameter in method.parameters() if parameter.requires_grad]
    cost = {}
    for name, forward in passes.items():
        with FlopCounterMode(display=False) as counter:
            outputs = forward()
        gradients = torch.autograd.grad([output.sum() for output in outputs], parameters, allow_unused=True)
        used = [p.numel() for p, gradient in zip(parameters, gradients, strict=True) if gradient is not None]
        cost[name] = {"parameters": sum(used), "multiply_adds": counter.get_total_flops() // 2}
    return cost
