import itertools

import numpy as np
import pytest
import torch

from semiseg.data import largest_components


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


@pytest.mark.parametrize("shape", [(14, 13), (9, 8, 7)])
@pytest.mark.parametrize("share", [0.5, 0.8, 0.95])
def test_against_flood_fill(shape, share):
    """Sparse labels make many small components of equal size, so ties are frequent."""
    random = np.random.default_rng(int(100 * share))
    for _ in range(8):
        label = random.integers(1, 4, (2, *shape), dtype=np.uint8) * (random.random((2, *shape)) > share)
        kept = largest_components(torch.from_numpy(label), 4)
        assert kept.dtype == torch.uint8
        np.testing.assert_array_equal(kept.numpy(), [by_flood_fill(one, 4) for one in label])


def test_classes_are_filtered_apart():
    label = torch.tensor([[[1, 1, 0, 2, 0, 1], [1, 1, 2, 2, 0, 0], [0, 0, 0, 0, 0, 2]]], dtype=torch.uint8)
    expected = torch.tensor([[[1, 1, 0, 2, 0, 0], [1, 1, 2, 2, 0, 0], [0, 0, 0, 0, 0, 0]]], dtype=torch.uint8)
    assert torch.equal(largest_components(label, 3), expected)


def test_diagonal_neighbours_touch():
    label = torch.zeros(1, 5, 5, 5, dtype=torch.uint8)
    for i in range(4):
        label[0, i, i, i] = 1
    label[0, 0, 3:, 0] = 1
    expected = label.clone()
    expected[0, 0, 3:, 0] = 0
    assert torch.equal(largest_components(label, 2), expected)


def test_nothing_to_keep():
    label = torch.zeros(2, 4, 4, dtype=torch.uint8)
    assert torch.equal(largest_components(label, 3), label)


def test_the_input_is_not_changed():
    label = torch.from_numpy(np.random.default_rng(0).integers(0, 3, (1, 9, 9), dtype=np.uint8))
    before = label.clone()
    largest_components(label, 3)
    assert torch.equal(label, before)
