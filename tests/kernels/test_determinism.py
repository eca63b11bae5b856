"""The same bits from any number of threads and on every run, and no copy of the embeddings on the way."""

import importlib

import pytest
import torch
from comparison import DTYPES, LAYOUTS, in_layout
from torch.utils._python_dispatch import TorchDispatchMode

from semiseg_kernels import (
    backends,
    batch_norm_relu,
    cluster_mean,
    dice_ce,
    masked_class_mean,
    prompt_mix,
    prototype_head,
    prototype_info_nce,
    prototype_similarity,
)

NUM_VOXELS = 65537 + 4096


def make_inputs(layout, dtype=torch.float32, num_voxels=NUM_VOXELS, prototypes_shape=(3, 2, 16)):
    num_classes, _, d = prototypes_shape
    z = in_layout(torch.randn(2, d, num_voxels), layout).to(dtype)
    labels = torch.randint(-1, num_classes, (2, num_voxels), dtype=torch.int8)
    regions = torch.randint(0, 2, (2, num_voxels), dtype=torch.uint8)
    return z, torch.randn(prototypes_shape), labels, regions, torch.rand(2, num_voxels)


OPERATIONS = {
    "prototype_similarity": lambda z, p, labels, regions, weight: prototype_similarity(z, p),
    "prototype_info_nce": lambda z, p, labels, regions, weight: (
        prototype_info_nce(z, p, labels=labels, weight=weight),
    ),
    "prototype_info_nce of dot products": lambda z, p, labels, regions, weight: (
        prototype_info_nce(z, p, normalize=False),
    ),
    "prototype_head": lambda z, p, labels, regions, weight: prototype_head(
        z, p, labels=labels, regions=regions, num_regions=2, weight=weight
    ),
    "cluster_mean": lambda z, p, labels, regions, weight: cluster_mean(z, p, labels, weight=weight),
    "dice_ce": lambda z, p, labels, regions, weight: dice_ce(z, labels, regions=regions, num_regions=2),
    # One map for all classes takes no memory of its own; test_masked_class_mean.py has others.
    "masked_class_mean": lambda z, p, labels, regions, weight: (
        masked_class_mean(z, weight.unsqueeze(1).expand(-1, p.shape[0], -1)),
    ),
    "prompt_mix": lambda z, p, labels, regions, weight: (prompt_mix(z, p.flatten(0, 1).T),),
    "batch_norm_relu": lambda z, p, labels, regions, weight: (normalise(z, p),),
}


def normalise(z, prototypes):
    parameters = prototypes[:2, :2].flatten(0, 1).to(torch.promote_types(z.dtype, torch.float32), copy=True)
    weight, mean, bias, variance = parameters
    return batch_norm_relu(z, weight, bias, mean, variance, negative_slope=0.1)


def everything(operation, inputs):
    z = inputs[0].detach().requires_grad_()
    results = OPERATIONS[operation](z, *inputs[1:])
    losses = [result.float().square().mean() for result in results if result.requires_grad]
    gradient = [torch.autograd.grad(sum(losses), z)[0]] if losses else []
    return [result.detach() for result in results] + gradient


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_same_bits_on_every_run_and_number_of_threads(kernel, operation, layout, threads):
    inputs = make_inputs(layout)
    runs = []
    for number in (1, 2, 3, 2):
        threads(number)
        runs.append(everything(operation, inputs))
    for run in runs[1:]:
        torch.testing.assert_close(run, runs[0], rtol=0, atol=0)


class Allocations(TorchDispatchMode):
    """The sizes in bytes of all tensors that operations return inside, views excepted."""

    def __init__(self):
        super().__init__()
        self.sizes = []

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        result = function(*arguments, **(options or {}))
        if not function.is_view:
            self.sizes += [x.untyped_storage().nbytes() for x in torch.utils._pytree.tree_leaves(result)
                           if isinstance(x, torch.Tensor)]  # fmt: skip
        return result


def launched(kernel, operation, direction, monkeypatch, sizes):
    """Record what the launch function allocates; a raw operation hides its inside from dispatch modes."""
    name = operation.partition(" ")[0]
    module = importlib.import_module(f"semiseg_kernels.{backends.PACKAGES[kernel]}.{name}")
    launch = getattr(module, direction)

    def recorded(*arguments):
        with Allocations() as allocations:
            result = launch(*arguments)
        sizes[direction] = allocations.sizes
        return result

    monkeypatch.setattr(module, direction, recorded)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_embeddings_are_never_copied(kernel, operation, dtype, layout, monkeypatch):
    """Nothing of the size of z is allocated but its gradient, neither by the wrapper nor by the launch."""
    inputs = make_inputs(layout, dtype)
    z = inputs[0].requires_grad_()
    sizes = {}
    launched(kernel, operation, "forward", monkeypatch, sizes)
    differentiable = operation != "cluster_mean"
    if differentiable:
        launched(kernel, operation, "backward", monkeypatch, sizes)
    with Allocations() as outside:
        results = OPERATIONS[operation](z, *inputs[1:])
    z_size = z.untyped_storage().nbytes()
    outputs = sum(result.untyped_storage().nbytes() for result in results)
    assert sizes["forward"], "the launch was not recorded"
    assert max(sizes["forward"] + outside.sizes) < max(z_size // 2, outputs + 1)
    if differentiable:
        losses = [result for result in results if result.requires_grad]
        # Upstream gradients in the results' memory format, as layers behind them send.
        torch.autograd.grad(losses, z, [torch.ones_like(loss) for loss in losses])
        large = [size for size in sizes["backward"] if size >= z_size // 2]
        assert large == [z_size], "backward allocates more than the gradient"


def test_saved_for_backward_is_small(kernel):
    """What backward keeps beyond the inputs is at most a few bytes a voxel."""
    z, prototypes, labels, regions, weight = make_inputs("contiguous")
    z.requires_grad_()
    saved = []
    inputs = {x.untyped_storage().data_ptr() for x in (z, prototypes, labels, regions, weight)}

    def pack(x):
        if x.untyped_storage().data_ptr() not in inputs:
            saved.append(x.untyped_storage().nbytes())
        return x

    for run in OPERATIONS.values():
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            run(z, prototypes, labels, regions, weight)
    assert saved and sum(saved) < 8 * 2 * NUM_VOXELS


def test_every_operation_of_a_backend_is_tested():
    # In the tests of the operation.
    elsewhere = {
        "convolution",
        "largest_components",
        "linear_classifier",
        "momentum_update",
        "strided_convolution",
    }
    assert backends.OPERATIONS["cpu"] - {"extension"} - elsewhere <= OPERATIONS.keys()
