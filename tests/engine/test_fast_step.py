"""One step of the fast path, kernels on channels-last tensors, against the plain one, PyTorch's operations on contiguous ones."""

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
SMALL = ("training.patch_size=[32, 16, 16]", "method.zero_box=[20, 10, 10]", "network.filters=[4]")
# Dropout of single values draws its random numbers in the order of memory, so another format drops others.
METHODS_AND_SIZES = {
    "supervised": ("phantom_supervised", SMALL[0], "network.filters=[16]"),  # so many have convolutions of their own
    "mper": ("phantom_mper", *SMALL, "method.ramp_up_iterations=0"),
    "vclipseg": ("phantom_vclipseg", SMALL[0], SMALL[2], "method.ramp_up_iterations=0"),
    "mper on slices": (
        "acdc_mper", "training.patch_size=[64, 48]", "method.zero_box=[40, 30]", "network.dropout=[0, 0, 0, 0, 0]",
        "training.labelled_batch=4", "training.unlabelled_batch=4", "method.ramp_up_iterations=0",
    ),
    "vclipseg on slices": (
        "acdc_vclipseg_small", "training.patch_size=[64, 48]", "network.dropout=[0, 0, 0, 0, 0]",
        "method.ramp_up_iterations=0",
    ),
}  # fmt: skip


def batch_of(config, num_classes):
    training = config.training
    generator = torch.Generator().manual_seed(1)
    image, unlabelled = (
        torch.randn(count, 1, *training.patch_size, generator=generator)
        for count in (training.labelled_batch, training.unlabelled_batch)
    )
    # Classes that the images show, as blobs: what the largest component of noise is hangs on single voxels.
    smooth = torch.nn.functional.avg_pool3d if len(training.patch_size) == 3 else torch.nn.functional.avg_pool2d
    level = smooth(image, 9, 1, 4)[:, 0]
    label = (level > level.std() * 0.5).byte() * torch.randint(1, num_classes, (1,), generator=generator).byte()
    return Batch(image + 3 * level.unsqueeze(1), label, unlabelled + 3 * smooth(unlabelled, 9, 1, 4))


def step_of(name, backend, channels_last, dtype=torch.float32):
    """Losses of a step, and everything the method holds after it."""
    configuration, *overrides = METHODS_AND_SIZES[name]
    config = load_config(
        configuration,
        [*overrides, "training.precision=float32", f"training.channels_last={str(channels_last).lower()}"],
    )
    num_classes = 4 if "slices" in name else 3
    with use_backend(backend):
        torch.manual_seed(0)
        text = METHODS[config.method.name].text(config, [f"class {c}" for c in range(num_classes)])
        method = build_method(config, num_classes, CPU, text).to(dtype)
        stage = method.stages(torch.Generator().manual_seed(0))[-1]
        if method.prototypes is not None:
            method.prototypes.copy_(torch.randn(method.prototypes.shape))
        optimiser = build_optimiser(config, method)
        torch.manual_seed(2)  # of dropout
        batch = Batch(*(tensor.to(dtype) if tensor.is_floating_point() else tensor
                        for tensor in vars(batch_of(config, num_classes)).values()))  # fmt: skip
        losses = TrainingStep(config, method, stage, optimiser, CPU, Processes())(batch, 0)
    return {**losses, **method.state_dict()}


def errors(result, exact):  # of every tensor, relative to its size
    def size(value):
        return value.double().square().mean().sqrt()

    return torch.stack([size(result[key].double() - value) / (size(value) + 1e-6) for key, value in exact.items()])


@pytest.mark.parametrize("name", METHODS_AND_SIZES)
def test_a_step_of_the_fast_path_is_one_of_the_plain_path(name):
    """Over all losses, parameters and buffers, the error is at most twice that of PyTorch's own operations in float32."""
    exact = step_of(name, "reference", channels_last=False, dtype=torch.float64)
    # Their error differs from one memory format to the other, as other features fall on the other side of a ReLU's zero.
    plain = [errors(step_of(name, "reference", channels_last), exact) for channels_last in (False, True)]
    fast = errors(step_of(name, "auto", channels_last=True), exact)
    assert fast.square().mean().sqrt() <= 2 * max(of_format.square().mean().sqrt() for of_format in plain)
    assert fast.max() <= 2 * max(of_format.max() for of_format in plain)
