import itertools

import numpy as np
import pytest
import torch
from scipy import ndimage

from semiseg_kernels import largest_components, use_backend

OPERATION = "largest_components"  # that not every backend has


def by_flood_fill(label: np.ndarray, num_classes: int) -> np.ndarray:
    """The definition: grow every component voxel by voxel in scan order; the first of the largest stays."""
    steps = [step for step in itertools.product((-1, 0, 1), repeat=label.ndim) if any(step)]
    kept = np.zeros_like(label)
    for value in range(1, num_classes):
        todo = {tuple(map(int, voxel)) for voxel in np.argwhere(label == value)}
        best: list[tuple[int, ...]] = []
        for start in sorted(todo):
            if start not in todo:
                continue
            todo.remove(start)
            component, front = [start], [start]
            while front:
                voxel = front.pop()
                for step in steps:
                    neighbour = tuple(a + b for a, b in zip(voxel, step, strict=True))
                    if neighbour in todo:
                        todo.remove(neighbour)
                        component.append(neighbour)
                        front.append(neighbour)
            if len(component) > len(best):
                best = component
        for voxel in best:
            kept[voxel] = value
    return kept


def noise(shape: tuple[int, ...], num_classes: int, background: float, seed: int = 0) -> torch.Tensor:
    random = np.random.default_rng(seed)
    label = random.integers(1, num_classes, shape, dtype=np.uint8) * (random.random(shape) > background)
    return torch.from_numpy(label)


def blobs(shape: tuple[int, ...], num_classes: int) -> torch.Tensor:
    """Smooth regions of every class, and islands."""
    random = np.random.default_rng(0)
    height = [ndimage.gaussian_filter(random.standard_normal(shape[1:]), 2.5) for _ in range(shape[0])]
    edges = np.quantile(height, np.linspace(0.5, 1, num_classes)[:-1])
    return torch.from_numpy(np.digitize(height, edges).astype(np.uint8))


@pytest.mark.parametrize("shape", [(40,), (14, 13), (9, 8, 7)])
@pytest.mark.parametrize("background", [0.5, 0.8, 0.95])
def test_against_flood_fill(backend, shape, background):
    """Sparse labels make many small components of equal size, so ties are frequent."""
    for seed in range(4):
        label = noise((2, *shape), 4, background, seed)
        kept = largest_components(label.to(torch.get_default_device()), 4)
        assert kept.dtype == torch.uint8
        np.testing.assert_array_equal(kept.cpu().numpy(), [by_flood_fill(x, 4) for x in label.numpy()])


# Odd sides, and lines shorter and longer than the words and warps that they are read by.
SHAPES = [(1, 7, 9, 11), (3, 5, 1, 64), (2, 1, 12, 1), (2, 33, 37), (1, 200), (2, 4, 6, 33), (1, 3, 2, 130)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kernel_is_the_reference(kernel, shape):
    cases = [
        noise(shape, num_classes, background) for num_classes in (2, 6) for background in (0.1, 0.6, 0.9)
    ]
    labels = [blobs(shape, 3), *cases, torch.zeros(shape).byte(), torch.ones(shape).byte()]
    # Triton's interpreter takes seconds for each.
    for label in labels[::3] if kernel == "triton" and not torch.cuda.is_available() else labels:
        given = label.to(torch.get_default_device())
        kept = largest_components(given, 4)
        with use_backend("reference"):
            assert torch.equal(kept, largest_components(given, 4))


@pytest.mark.parametrize("number", [1, 2, 5])
@pytest.mark.parametrize("batch", [1, 2, 3])
def test_levels_and_threads(level, batch, number, threads):
    """With more threads than images an image is cut into slabs, also thinner than a plane."""
    threads(number)
    for label in (
        blobs((batch, 24, 20, 29), 3),
        noise((batch, 3, 20, 29), 3, 0.7),
        noise((batch, 2, 2), 2, 0.2),
    ):
        with use_backend("cpu"):
            kept = largest_components(label, 3)
        with use_backend("reference"):
            assert torch.equal(kept, largest_components(label, 3))


def test_classes_are_filtered_apart(backend):
    label = torch.tensor([[[1, 1, 0, 2, 0, 1], [1, 1, 2, 2, 0, 0], [0, 0, 0, 0, 0, 2]]], dtype=torch.uint8)
    expected = torch.tensor([[[1, 1, 0, 2, 0, 0], [1, 1, 2, 2, 0, 0], [0, 0, 0, 0, 0, 0]]], dtype=torch.uint8)
    assert torch.equal(largest_components(label, 3), expected)


def test_classes_may_touch_and_cross(backend):
    label = torch.tensor([[[1, 1, 2, 2], [2, 2, 1, 1], [0, 0, 0, 0], [1, 2, 1, 2]]], dtype=torch.uint8)
    expected = label.clone()
    expected[0, 3] = 0
    assert torch.equal(largest_components(label, 3), expected)


def test_lines_do_not_touch_where_one_ends_and_the_next_begins(backend):
    label = torch.zeros(1, 3, 4, 5, dtype=torch.uint8)
    label[0, 1, 1, 4] = label[0, 1, 2, 0] = label[0, 1, 3, 2] = label[0, 2, 0, 2] = 1
    expected = torch.zeros_like(label)
    expected[0, 1, 1, 4] = 1
    assert torch.equal(largest_components(label, 2), expected)


def test_diagonal_neighbours_touch(backend):
    label = torch.zeros(1, 5, 5, 5, dtype=torch.uint8)
    for i in range(4):
        label[0, i, i, i] = 1
    label[0, 0, 3:, 0] = 1
    expected = label.clone()
    expected[0, 0, 3:, 0] = 0
    assert torch.equal(largest_components(label, 2), expected)


def test_of_equal_components_the_first_stays(backend):
    label = torch.zeros(2, 3, 9, dtype=torch.uint8)
    label[0, 0, 6:8] = label[0, 2, 1:3] = label[1, 2, :4] = label[1, 0, 5:] = 1
    expected = label.clone()
    expected[0, 2] = expected[1, 2] = 0
    assert torch.equal(largest_components(label, 2), expected)


def test_a_component_may_wind(backend):
    """A snake, whose arms meet late in the scan, beside a block larger than any of them."""
    label = torch.zeros(1, 11, 17, dtype=torch.uint8)
    label[0, ::2, :11] = label[0, 1::4, 10] = label[0, 3::4, 0] = 1
    label[0, 1:10, 13:17] = 1
    expected = label.clone()
    expected[0, :, 13:] = 0
    assert int(expected.sum()) == 6 * 11 + 5 and int((label - expected).sum()) == 36
    assert torch.equal(largest_components(label, 2), expected)


def test_values_beyond_the_classes_are_background(backend):
    label = torch.tensor([[1, 1, 3, 1, 255, 2]], dtype=torch.uint8)
    assert largest_components(label, 3).tolist() == [[1, 1, 0, 0, 0, 2]]
    assert largest_components(label, 4).tolist() == [[1, 1, 3, 0, 0, 2]]
    assert largest_components(label, 256).tolist() == [[1, 1, 3, 0, 255, 2]]
    assert largest_components(label, 1).tolist() == [[0] * 6]


@pytest.mark.parametrize("shape", [(0, 4, 4), (2, 0, 4, 4), (2, 4, 0, 4), (2, 4, 4, 0), (2, 0), (1, 1, 1, 1)])
def test_empty_and_background(backend, shape):
    label = torch.zeros(shape, dtype=torch.uint8)
    assert torch.equal(largest_components(label, 3), label)


def test_strides_and_the_input_stays(backend):
    whole = noise((2, 4, 5, 9), 3, 0.6).to(torch.get_default_device())
    before = whole.clone()
    for view in (whole[:, ::2, 1:, ::3], whole.transpose(1, 3), whole[:1].expand(3, -1, -1, -1)):
        kept = largest_components(view, 3)
        assert kept.is_contiguous() and torch.equal(kept, largest_components(view.contiguous(), 3))
    assert torch.equal(whole, before)


@pytest.mark.parametrize("kernel", ["cuda"], indirect=True)
@pytest.mark.parametrize("order", ["forward", "reverse", "shuffled"])
def test_the_order_of_threads_changes_nothing(kernel, order, monkeypatch):
    monkeypatch.setenv("SEMISEG_EMULATED_ORDER", order)
    for label in (blobs((2, 7, 9, 40), 3), noise((2, 6, 7, 50), 3, 0.6)):
        label = label.to(torch.get_default_device())
        kept = largest_components(label, 3)
        with use_backend("reference"):
            assert torch.equal(kept, largest_components(label, 3))


@pytest.mark.gpu
@pytest.mark.parametrize("kernel", ["cuda", "triton"], indirect=True)
def test_on_a_gpu(kernel):
    """Threads that run at once join the same components; nothing waits for them, and a graph replays it."""
    labels = [
        blobs((4, 112, 112, 80), 4),
        noise((4, 112, 112, 80), 3, 0.6),
        noise((4, 112, 112, 80), 2, 0.02),
    ]
    with use_backend("reference"):
        expected = [largest_components(label.cpu(), 4).cuda() for label in labels]
    given = [label.cuda() for label in labels]
    largest_components(given[0], 4)
    torch.cuda.set_sync_debug_mode("error")
    try:
        kept = [[largest_components(label, 4) for label in given] for _ in range(5)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(x, y) for run in kept for x, y in zip(run, expected, strict=True))

    static, graph = given[0].clone(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = largest_components(static, 4)
    for label, right in zip(given, expected, strict=True):
        static.copy_(label)
        graph.replay()
        assert torch.equal(result, right)


def test_opcheck(kernel):
    label = noise((2, 5, 6, 7), 3, 0.6).to(torch.get_default_device())
    for given in (label, label.transpose(1, 3)):
        torch.library.opcheck(torch.ops.semiseg_kernels.largest_components_forward, (given, 3, kernel))


def test_one_graph_for_every_number_of_voxels(kernel):
    torch._dynamo.reset()
    compiled = torch.compile(largest_components, fullgraph=True, dynamic=True, backend="aot_eager")
    for shape in ((2, 5, 6, 7), (2, 3, 9, 4), (2, 11, 2, 13)):
        label = noise(shape, 3, 0.6).to(torch.get_default_device())
        with torch._dynamo.config.patch(error_on_recompile=True):
            kept = compiled(label, 3)
        assert torch.equal(kept, largest_components(label, 3))


LABEL = torch.zeros(2, 5, 7, dtype=torch.uint8)
WRONG = {
    "label has dtype int64, accepted are uint8": (LABEL.long(), 2),
    "label has dtype bool, accepted are uint8": (LABEL.bool(), 2),
    "label has shape [7], accepted is [B, *S], *S 1 to 3 axes of fewer than 2^31 voxels": (LABEL[0, 0], 2),
    "label has shape [2, 5, 7, 1, 1], accepted is [B, *S], *S 1 to 3 axes of fewer than 2^31 voxels": (
        LABEL[..., None, None],
        2,
    ),
    "label has shape [1, 65536, 32768], accepted is [B, *S], *S 1 to 3 axes of fewer than 2^31 voxels": (
        LABEL[:1, :1, :1].expand(1, 65536, 32768),
        2,
    ),
    "num_classes is 0, accepted are 1..256": (LABEL, 0),
    "num_classes is 257, accepted are 1..256": (LABEL, 257),
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_arguments(message):
    with pytest.raises(ValueError) as error:
        largest_components(*WRONG[message])
    assert str(error.value) == message
