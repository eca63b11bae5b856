import io
from collections import Counter

import numpy as np
import pytest
import torch

from semiseg.data import Augmentation, Case, TrainingSampler, TrainingTensors

PATCH = (3, 4, 2)


def constant_cases(values: range, channels: int = 1) -> list[Case]:
    """Cases whose image holds their number everywhere."""
    shape = (5, 4, 3)
    return [
        Case(str(v), np.full((channels, *shape), v, np.float32), np.full(shape, v % 2, np.uint8), None) for v in values
    ]


def tensors(labelled: list[Case], unlabelled: list[Case]) -> TrainingTensors:
    return TrainingTensors(labelled, unlabelled, torch.device("cpu"))


def sampler(
    labelled: int = 5, unlabelled: int = 7, batches: tuple[int, int] = (2, 3), seed: int = 0
) -> TrainingSampler:
    return TrainingSampler(
        tensors(constant_cases(range(labelled)), constant_cases(range(100, 100 + unlabelled))),
        Augmentation("crop_rotate_flip", PATCH),
        *batches,
        seed,
    )


def numbers(image: torch.Tensor) -> list[int]:
    return image[:, 0, 0, 0, 0].int().tolist()


def assert_same(one: tuple, other: tuple) -> None:
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize("channels", [1, 3])
def test_shapes_types_and_streams(channels):
    cases = tensors(constant_cases(range(5), channels), constant_cases(range(100, 107), channels))
    image, label, unlabelled = TrainingSampler(cases, Augmentation("crop_rotate_flip", PATCH), 2, 3, 0).next()
    assert (image.shape, image.dtype) == ((2, channels, *PATCH), torch.float32)
    assert (label.shape, label.dtype) == ((2, *PATCH), torch.uint8)
    assert (unlabelled.shape, unlabelled.dtype) == ((3, channels, *PATCH), torch.float32)
    assert max(numbers(image)) < 100 <= min(numbers(unlabelled))
    assert label[:, 0, 0, 0].tolist() == [number % 2 for number in numbers(image)]


def test_image_and_label_get_the_same_augmentation():
    random = np.random.default_rng(0)
    image = random.integers(0, 200, (9, 9, 9)).astype(np.float32)
    cases = [Case("one", np.stack([image, -image]), image.astype(np.uint8), None)]
    augmentation = Augmentation("crop_rotate_flip", (5, 5, 5))
    image, label, _ = TrainingSampler(tensors(cases, []), augmentation, 1, 0, 0).next()
    assert_same((image[:, 0], -image[:, 1]), (label.float(), label.float()))


def test_the_order_of_the_random_numbers():
    """Labelled cases, their patches, unlabelled cases, their patches: a seed keeps its meaning."""
    random = np.random.default_rng(0)
    images = random.standard_normal((4, 6, 5)).astype(np.float32)
    labels = random.integers(0, 4, images.shape, dtype=np.uint8)
    cases = [Case("", image[np.newaxis], label, None) for image, label in zip(images, labels, strict=True)]
    batches = TrainingSampler(
        tensors(cases[:2], cases[2:]), Augmentation("crop_rotate_flip", (3, 4)), 2, 1, 5
    )
    draws = torch.Generator().manual_seed(5)

    def draw(count: int) -> int:
        return int(torch.randint(count, (), generator=draws))

    def box_of(turn: tuple[int, int]) -> tuple[slice, slice]:
        height, width = (6, 5) if turn[0] % 2 == 0 else (5, 6)
        row, column = draw(height - 3 + 1), draw(width - 4 + 1)
        return slice(row, row + 3), slice(column, column + 4)

    def patch(array: np.ndarray, turn: tuple[int, int], box: tuple[slice, slice]) -> np.ndarray:
        return np.flip(np.rot90(array, turn[0]), turn[1])[box]

    for step in range(6):
        image, label, unlabelled = batches.next()
        for row, i in enumerate(torch.randperm(2, generator=draws).tolist()):
            box = box_of(turn := (draw(4), draw(2)))
            np.testing.assert_array_equal(image[row, 0], patch(images[i], turn, box))
            np.testing.assert_array_equal(label[row], patch(labels[i], turn, box))
        if step % 2 == 0:  # a permutation of two lasts for two batches of one
            order = torch.randperm(2, generator=draws).tolist()
        box = box_of(turn := (draw(4), draw(2)))
        np.testing.assert_array_equal(unlabelled[0, 0], patch(images[2 + order[step % 2]], turn, box))


def test_an_epoch_visits_every_case_once_and_is_shuffled():
    batches = sampler(6, 6, (2, 3))
    epochs = []
    for _ in range(20):
        drawn = [batches.next() for _ in range(3)]
        epochs.append(tuple(n for image, _, _ in drawn for n in numbers(image)))
        assert sorted(epochs[-1]) == list(range(6))
    assert len(set(epochs)) > 15


@pytest.mark.parametrize(("count", "batch"), [(5, 2), (5, 4), (5, 5), (7, 3)])
def test_no_case_twice_in_a_batch_and_all_are_used(count, batch):
    batches, seen = sampler(count, 1, (batch, 0)), Counter()
    for _ in range(60):
        drawn = numbers(batches.next()[0])
        assert len(set(drawn)) == batch
        seen.update(drawn)
    assert len(seen) == count and min(seen.values()) > 60 * batch / count / 2


def test_fewer_cases_than_the_batch_repeat_evenly():
    batches = sampler(3, 1, (7, 0))
    for _ in range(10):
        assert sorted(Counter(numbers(batches.next()[0])).values()) == [2, 2, 3]


@pytest.mark.parametrize("channels", [1, 2])
def test_a_stream_of_no_cases(channels):
    cases = tensors(constant_cases(range(2), channels), [])
    batches = TrainingSampler(cases, Augmentation("crop", PATCH), 2, 0, 0)
    assert batches.next()[2].shape == (0, channels, *PATCH)


def test_the_seed_decides_everything():
    one, other, third = sampler(seed=3), sampler(seed=3), sampler(seed=4)
    drawn = [one.next() for _ in range(8)]
    for batch in drawn:
        assert_same(batch, other.next())
    assert any(numbers(batch[2]) != numbers(third.next()[2]) for batch in drawn)


@pytest.mark.parametrize("steps", [0, 1, 2, 5])
def test_a_saved_state_continues_exactly(steps):
    one = sampler()
    for _ in range(steps):
        one.next()
    stored = io.BytesIO()
    torch.save(one.state_dict(), stored)
    expected = [one.next() for _ in range(7)]
    stored.seek(0)
    other = sampler(seed=99)
    other.next()
    other.load_state_dict(torch.load(stored, weights_only=True))
    for batch in expected:
        assert_same(batch, other.next())


def test_a_state_is_not_changed_by_drawing_on():
    one, other = sampler(), sampler(seed=1)
    one.next()
    state = one.state_dict()
    expected = [one.next() for _ in range(6)]
    other.load_state_dict(state)
    for batch in expected:
        assert_same(batch, other.next())


def test_a_state_of_other_cases_is_refused():
    with pytest.raises(ValueError, match="state has 7 unlabelled cases; this sampler has 6"):
        sampler(unlabelled=6).load_state_dict(sampler().state_dict())


@pytest.mark.parametrize(("unlabelled", "batches", "message"), [
    (0, (1, 2), "training.unlabelled_batch is 2, accepted with 0 unlabelled cases is 0"),
    (3, (-1, 2), "labelled_batch is -1"),
    (3, (1, -2), "unlabelled_batch is -2"),
])  # fmt: skip
def test_impossible_batches_are_refused(unlabelled, batches, message):
    with pytest.raises(ValueError, match=message):
        sampler(3, unlabelled, batches)


def test_two_processes_share_the_batch_of_one():
    def drawn(*share):
        cases = tensors(constant_cases(range(5)), constant_cases(range(100, 107)))
        shared = TrainingSampler(cases, Augmentation("crop_rotate_flip", PATCH), 4, 2, 0, *share)
        return [shared.next() for _ in range(4)]

    for whole, *parts in zip(drawn(), drawn(0, 2), drawn(1, 2), strict=True):
        for process, part in enumerate(parts):
            assert_same(part, tuple(tensor[process::2] for tensor in whole))
    with pytest.raises(ValueError, match="labelled_batch is 4, accepted for 3 processes are multiples of 3"):
        drawn(0, 3)
