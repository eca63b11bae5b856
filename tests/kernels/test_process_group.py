"""The operations on two processes, each with a part of the batch, against one process with all of it."""

from datetime import timedelta

import pytest
import torch
from torch import distributed, multiprocessing

from semiseg_kernels import (
    available_backends,
    batch_norm_relu,
    cluster_mean,
    dice_ce,
    masked_class_mean,
    prototype_head,
    prototype_info_nce,
    sum_over_processes,
    use_backend,
    use_process_group,
)

PROCESSES = 2
SHARED = ("prototypes",)  # what every process has whole
DTYPES = {"reference": torch.float64, "cpu": torch.float32}
BACKENDS = [name for name in DTYPES if name in available_backends()]


def losses_of_head(x, **options):
    head = prototype_head(
        x["z"], x["prototypes"], labels=x["labels"], regions=x["regions"], num_regions=3, weight=x["weight"],
        **options,
    )  # fmt: skip
    return head.ce, head.dice, head.info_nce, head.cluster_sum, head.cluster_count


def moments_of_batch_norm_relu(x):
    """Moved statistics, and sums of the normalised activations that hang on every voxel differently."""
    z = x["z"]
    weight, bias, mean, variance = (torch.linspace(first, 1, 5, dtype=z.dtype) for first in (0.5, -1, 0.1, 2))
    y = batch_norm_relu(z, weight, bias, mean, variance, momentum=0.3, negative_slope=0.2)
    return (mean, variance, *sum_over_processes((y * x["weight"].unsqueeze(1)).sum((0, 2, 3)), y.pow(3).sum((0, 2, 3))))


# The tensors that must be those of the joined batch.
OPERATIONS = {
    "dice_ce": lambda x: dice_ce(x["z"][:, :3], x["labels"], regions=x["regions"], num_regions=3),
    "dice_ce, soft target": lambda x: dice_ce(x["z"][:, :3], x["shares"], temperature=0.5),
    "dice_ce, other Dice": lambda x: dice_ce(
        x["z"][:, :3], x["labels"], regions=x["regions"], num_regions=3, squared=False, include_background=False
    ),
    "prototype_info_nce": lambda x: (prototype_info_nce(x["z"], x["prototypes"]),),
    "prototype_info_nce, weights": lambda x: (
        prototype_info_nce(
            x["z"], x["prototypes"], labels=x["labels"], weight=x["weight"], ignore_prototype=1
        ),
    ),
    "prototype_head": losses_of_head,
    "prototype_head, by label": lambda x: losses_of_head(
        x, positive="label", squared=False, return_similarity=False
    ),
    "prototype_head without labels": lambda x: (prototype_head(x["z"], x["prototypes"]).info_nce,),
    "prototype_head, similarity alone": lambda x: sum_over_processes(
        prototype_head(x["z"], x["prototypes"]).similarity.square().sum()
    ),
    "batch_norm_relu": moments_of_batch_norm_relu,
    "masked_class_mean": lambda x: (masked_class_mean(x["z"], x["shares"]),),
    "cluster_mean": lambda x: cluster_mean(x["z"], x["prototypes"], x["labels"], weight=x["weight"]),
    "sum_over_processes": lambda x: sum_over_processes(x["z"].square().sum((0, 2, 3)), x["labels"].sum()),
}


def joined_batch(dtype):
    """Four images. Class 2 and region 1 are in those of process 1 alone, region 2 nowhere; one class has no share."""
    generator = torch.Generator().manual_seed(3)
    z = torch.randn(4, 5, 6, 7, generator=generator, dtype=torch.float64)
    labels = torch.randint(-1, 2, (4, 6, 7), generator=generator)
    labels[1::2, :2] = 2
    regions = torch.zeros(4, 6, 7, dtype=torch.uint8)
    regions[3, :, :3] = 1
    shares = torch.rand(4, 3, 6, 7, generator=generator, dtype=torch.float64)
    shares[:, 1] = 0
    shares[::2, 2] = 0
    return {
        "z": z.to(dtype),
        "prototypes": torch.randn(3, 2, 5, generator=generator, dtype=torch.float64).to(dtype),
        "labels": labels,
        "regions": regions,
        "weight": torch.rand(4, 6, 7, generator=generator, dtype=torch.float64).to(dtype),
        "shares": shares.to(dtype),
    }


def results_and_gradient(operation, x, factor=1):
    """What an operation gives, and the gradient in z of `factor` times a sum with different weights for all of it."""
    z = x["z"].clone().requires_grad_()
    results = tuple(operation({**x, "z": z}))
    differentiable = [result for result in results if result.requires_grad]
    if not differentiable:
        return results, None
    weights = torch.linspace(1, 2, sum(result.numel() for result in differentiable), dtype=torch.float64)
    loss = (weights * torch.cat([result.flatten() for result in differentiable])).sum()
    (gradient,) = torch.autograd.grad(factor * loss, z)
    return tuple(result.detach() for result in results), gradient


def process(rank, folder):
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    distributed.init_process_group(
        "gloo", init_method=store, rank=rank, world_size=PROCESSES, timeout=timedelta(seconds=60)
    )
    measured = {}
    for backend in BACKENDS:
        batch = joined_batch(DTYPES[backend])
        share = {name: value if name in SHARED else value[rank::PROCESSES] for name, value in batch.items()}
        for name, operation in OPERATIONS.items():
            with use_backend(backend), use_process_group(distributed.group.WORLD):
                measured[backend, name] = results_and_gradient(operation, share, factor=rank + 1)
    with use_process_group(distributed.group.WORLD):
        seen = torch.tensor([rank == 0, rank == 1, False])
        measured["bool"] = sum_over_processes(seen)[0]
        with use_process_group(None):
            measured["alone"] = sum_over_processes(torch.tensor(rank))[0]
        try:
            dice_ce(share["z"], share["labels"], regions=share["regions"])
        except ValueError as error:
            measured["error"] = str(error)
    torch.save(measured, f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """What either process returned."""
    folder = tmp_path_factory.mktemp("processes")
    multiprocessing.spawn(process, (str(folder),), nprocs=PROCESSES)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(PROCESSES)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", OPERATIONS)
def test_results_are_those_of_the_joined_batch(measured, name, backend):
    tolerance = {"rtol": 1e-9, "atol": 1e-12} if DTYPES[backend] == torch.float64 else {}
    with use_backend(backend):
        expected, gradient = results_and_gradient(OPERATIONS[name], joined_batch(DTYPES[backend]))
    factor = sum(range(1, PROCESSES + 1))  # each process multiplied its loss by another number
    for rank in range(PROCESSES):
        results, own_gradient = measured[rank][backend, name]
        torch.testing.assert_close(results, expected, **tolerance)
        assert all(torch.equal(a, b) for a, b in zip(results, measured[0][backend, name][0], strict=True))
        if gradient is None:
            assert own_gradient is None
        else:
            torch.testing.assert_close(own_gradient, factor * gradient[rank::PROCESSES], **tolerance)


def test_a_sum_of_booleans_is_their_or(measured):
    assert [each["bool"].tolist() for each in measured] == [[True, True, False]] * PROCESSES


def test_no_group_within_a_group(measured):
    assert [each["alone"].item() for each in measured] == [0, 1]


def test_processes_might_count_different_regions(measured):
    assert "num_regions is None" in measured[0]["error"]


def test_without_a_group_tensors_come_back_themselves():
    tensors = (torch.ones(2), torch.zeros(3))
    assert all(a is b for a, b in zip(sum_over_processes(*tensors), tensors, strict=True))
