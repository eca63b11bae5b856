"""How far rounding in the network turns its gradient: python benchmarks/gradient_rounding.py [--results FILE]

The baseline is trained in float32 on the phantom. After 0, 100 and 400 steps the gradient of a batch is computed in
float32, then again with rounding somewhere: by hand, of the numbers that enter and leave each convolution, or by autocast.
The difference counts relative to the gradient in float32, for the weights of every convolution.
"""

import argparse
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from results_file import write_results
from torch import Tensor, nn

from semiseg.config import load_config
from semiseg.data import Augmentation, TrainingSampler, TrainingTensors
from semiseg.engine.distributed import Processes
from semiseg.engine.trainer import build_method, build_optimiser, open_configured_dataset
from semiseg.engine.training_step import TrainingStep
from semiseg.methods.method import Batch, Method, Stage

CPU = torch.device("cpu")
CONFIGURATION = "phantom_supervised"
STEPS = (0, 100, 400)
BATCHES = 4
Rounding = Callable[[Tensor], Tensor]


def exact(x: Tensor) -> Tensor:
    return x.clone()


def to_bfloat16(x: Tensor) -> Tensor:
    return x.bfloat16().float()


def to_ten_bits(x: Tensor) -> Tensor:
    """The mantissa of float16 and of TF32, in which GPUs convolve float32."""
    return x.half().float()


class _Rounded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, forward: Rounding, backward: Rounding) -> Tensor:
        ctx.rounding = backward
        return forward(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return ctx.rounding(grad), None, None


@contextmanager
def rounded(network: nn.Module, forward: Rounding, backward: Rounding) -> Iterator[None]:
    """Round what enters and leaves every convolution: weights and features, and the gradients of features."""
    layers = [module for module in network.modules() if isinstance(module, nn.Conv3d | nn.ConvTranspose3d)]
    weights = [layer.weight.detach().clone() for layer in layers]
    hooks = []
    with torch.no_grad():
        for layer in layers:
            layer.weight.copy_(forward(layer.weight))
    for layer in layers:
        hooks.append(
            # The classifier is given dropout's scales as well, without which its gradient is another one.
            layer.register_forward_pre_hook(
                lambda _, inputs: (_Rounded.apply(inputs[0], forward, backward), *inputs[1:])
            )
        )
        hooks.append(
            layer.register_forward_hook(lambda _, inputs, output: _Rounded.apply(output, forward, backward))
        )
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        with torch.no_grad():
            for layer, weight in zip(layers, weights, strict=True):
                layer.weight.copy_(weight)


ROUNDINGS = {  # what a row is called -> how the network computes
    "forward and backward to bfloat16": lambda network: rounded(network, to_bfloat16, to_bfloat16),
    "forward to bfloat16": lambda network: rounded(network, to_bfloat16, exact),
    "backward to bfloat16": lambda network: rounded(network, exact, to_bfloat16),
    "forward to ten bits": lambda network: rounded(network, to_ten_bits, exact),
    "autocast to bfloat16": lambda network: torch.autocast("cpu", torch.bfloat16),
}


def gradients(method: Method, stage: Stage, batch: Batch, step: int, seed: int) -> list[Tensor]:
    """Of the loss in the weights of every convolution; leaves the method as it was."""
    state = {name: value.clone() for name, value in method.state_dict().items()}
    weights = [parameter for parameter in method.parameters() if parameter.ndim > 1]
    torch.manual_seed(seed)  # the same dropout
    loss = stage.losses(batch, stage.inputs(batch, step))["total"]
    grads = torch.autograd.grad(loss, weights)
    method.load_state_dict(state)
    return list(grads)


def differences(method: Method, stage: Stage, batches: list[Batch], step: int) -> dict[str, float]:
    """Per rounding the median over batches and weights of |rounded - float32| / |float32|."""
    found: dict[str, list[float]] = {name: [] for name in ROUNDINGS}
    for seed, batch in enumerate(batches):
        expected = gradients(method, stage, batch, step, seed)
        for name, rounding in ROUNDINGS.items():
            with rounding(method.network):
                grads = gradients(method, stage, batch, step, seed)
            found[name] += [
                ((ours - right).norm() / right.norm()).item() for ours, right in zip(grads, expected, strict=True)
            ]
    return {name: statistics.median(values) for name, values in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, metavar="FILE", help="write the rows as JSON")
    options = parser.parse_args()
    config = load_config(CONFIGURATION, ["training.precision=float32"])
    torch.manual_seed(config.seed)
    dataset = open_configured_dataset(config)
    method = build_method(config, len(dataset.class_names), CPU)
    stage = method.stages(torch.Generator().manual_seed(config.seed))[0]
    sampler = TrainingSampler(
        TrainingTensors(*dataset.training_cases(config.dataset.labelled), CPU),
        Augmentation(config.dataset.augmentation, config.training.patch_size),
        config.training.labelled_batch,
        0,
        seed=config.seed,
    )
    take_step = TrainingStep(config, method, stage, build_optimiser(config, method), CPU, Processes())
    method.network.train()
    rows = []
    for step in range(max(STEPS) + 1):
        if step in STEPS:
            batches = [Batch(*sampler.next()) for _ in range(BATCHES)]
            rows.append({"step": step, "differences": differences(method, stage, batches, step)})
            print(rows[-1], flush=True)
        take_step(Batch(*sampler.next()), step)
    if options.results:
        write_results(options.results, rows, configuration=CONFIGURATION, batches=BATCHES)


if __name__ == "__main__":
    main()
