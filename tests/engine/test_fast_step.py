"""One step of the fast path (kernels, channels-last tensors) against the plain one (PyTorch's, contiguous ones)."""

import pytest
import torch

from semiseg.config import load_config
from semiseg.engine.distributed import Processes
from semiseg.engine.trainer import build_method, build_optimiser
from semiseg.engine.training_step import TrainingStep
from semiseg.methods import METHODS
from semiseg.methods.method import Batch
from semiseg_kernels import use_backend

CPU = torch.device("cpu")
SEEDS = range(5)
PATCH = ("training.patch_size=[32, 16, 16]", "evaluation.stride=[32, 16, 16]")
# Dropout of single values draws its random numbers in the order of memory, so another format drops others.
METHODS_AND_SIZES = {
    "supervised": ("phantom_supervised", *PATCH, "network.filters=[16]"),  # so many have convolutions of their own
    "mper": (
        "phantom_mper", *PATCH, "method.zero_box=[20, 10, 10]", "network.filters=[4]", "method.ramp_up_iterations=0",
    ),
    "vclipseg": ("phantom_vclipseg", *PATCH, "network.filters=[4]", "method.ramp_up_iterations=0"),
    "mper on slices": (
        "acdc_mper", "training.patch_size=[64, 48]", "method.zero_box=[40, 30]", "network.dropout=[0, 0, 0, 0, 0]",
        "training.labelled_batch=4", "training.unlabelled_batch=4", "method.ramp_up_iterations=0",
    ),
    "vclipseg on slices": (
        "acdc_vclipseg_small", "training.patch_size=[64, 48]", "network.dropout=[0, 0, 0, 0, 0]",
        "method.ramp_up_iterations=0",
    ),
}  # fmt: skip


def batch_of(config, num_classes, seed):
    training = config.training
    generator = torch.Generator().manual_seed(seed)
    image, unlabelled = (
        torch.randn(count, 1, *training.patch_size, generator=generator)
        for count in (training.labelled_batch, training.unlabelled_batch)
    )
    # Classes that the images show, as blobs: what the largest component of noise is hangs on single voxels.
    smooth = torch.nn.functional.avg_pool3d if len(training.patch_size) == 3 else torch.nn.functional.avg_pool2d
    level = smooth(image, 9, 1, 4)[:, 0]
    label = (level > level.std() * 0.5).byte() * torch.randint(1, num_classes, (1,), generator=generator).byte()
    return Batch(image + 3 * level.unsqueeze(1), label, unlabelled + 3 * smooth(unlabelled, 9, 1, 4))


def step_of(name, seed, backend, channels_last, dtype=torch.float32):
    """Losses of a step, and everything the method holds after it."""
    configuration, *overrides = METHODS_AND_SIZES[name]
    config = load_config(
        configuration,
        [*overrides, "training.precision=float32", f"training.channels_last={str(channels_last).lower()}"],
    )
    num_classes = 4 if "slices" in name else 3
    with use_backend(backend):
        torch.manual_seed(seed)
        text = METHODS[config.method.name].text(config, [f"class {c}" for c in range(num_classes)])
        method = build_method(config, num_classes, CPU, text).to(dtype)
        stage = method.stages(torch.Generator().manual_seed(0))[-1]
        if method.prototypes is not None:
            method.prototypes.copy_(torch.randn(method.prototypes.shape))
        optimiser = build_optimiser(config, method)
        torch.manual_seed(2)  # of dropout
        batch = Batch(*(tensor.to(dtype) if tensor.is_floating_point() else tensor
                        for tensor in vars(batch_of(config, num_classes, seed)).values()))  # fmt: skip
        losses = TrainingStep(config, method, stage, optimiser, CPU, Processes())(batch, 0)
    return {**losses, **method.state_dict()}


def errors(name, backend, channels_last, exact):
    """Of a step's losses and of all the method holds after it, relative to their sizes: root mean square and largest.

    The median of several steps: in some a feature falls on the other side of a ReLU's zero, which decides the error.
    """

    def size(value):
        return value.double().square().mean().sqrt()

    steps = []
    for seed, truth in exact.items():
        result = step_of(name, seed, backend, channels_last)
        of_tensors = [size(result[key].double() - value) / (size(value) + 1e-6) for key, value in truth.items()]
        steps.append(torch.stack([size(torch.stack(of_tensors)), max(of_tensors)]))
    return torch.stack(steps).median(0).values


@pytest.mark.parametrize("name", METHODS_AND_SIZES)
def test_a_step_of_the_fast_path_is_one_of_the_plain_path(name):
    """The error is at most twice that of PyTorch's own operations in float32, in the worse memory format."""
    exact = {seed: step_of(name, seed, "reference", channels_last=False, dtype=torch.float64) for seed in SEEDS}
    plain = torch.maximum(*(errors(name, "reference", channels_last, exact) for channels_last in (False, True)))
    fast = errors(name, "auto", channels_last=True, exact=exact)
    assert (fast <= 2 * plain).all(), f"{fast} where PyTorch's are {plain}"
