import gc

import numpy as np
import pytest
import torch

from semiseg.data import Augmentation, Case, TrainingSampler, TrainingTensors, UnlabelledCase
from semiseg.data.compact_image import CompactImage, compact
from semiseg.data.training_tensors import fits

CPU = torch.device("cpu")


def random_cases(count: int, *shape: int, channels: int = 1) -> list[Case]:
    random = np.random.default_rng(count)
    return [
        Case(
            str(number),
            random.standard_normal((channels, *shape)).astype(np.float32),
            random.integers(0, 4, shape, dtype=np.uint8),
            None,
        )
        for number in range(count)
    ]


@pytest.mark.parametrize("channels", [1, 3])
def test_on_the_cpu_they_share_the_memory_of_the_cases(channels):
    labelled, unlabelled = random_cases(2, 4, 5, channels=channels), random_cases(3, 4, 5, channels=channels)
    tensors = TrainingTensors(labelled, [*unlabelled[:2], UnlabelledCase("", unlabelled[2].image)], CPU)
    held = [*tensors.labelled, *tensors.unlabelled]
    arrays = [(case.image, case.label) for case in labelled] + [(case.image,) for case in unlabelled]
    for case, expected in zip(held, arrays, strict=True):
        assert [values.data_ptr() for values in case] == [array.ctypes.data for array in expected]
    assert tensors.channels == channels
    assert all(image.shape == (channels, 4, 5) for image, *_ in held)
    assert all((label.dtype, label.shape) == (torch.uint8, (1, 4, 5)) for _, label in tensors.labelled)


def test_unlabelled_labels_are_not_kept():
    unlabelled = random_cases(3, 4, 5)
    tensors = TrainingTensors([], unlabelled, CPU)
    holders = [
        holder
        for case in unlabelled
        for holder in gc.get_referrers(case.label)
        if isinstance(holder, dict | tuple | list)
    ]
    assert len(tensors.unlabelled) == 3
    assert all(any(holder is vars(case) for case in unlabelled) for holder in holders)


def test_a_gpu_holds_at_most_half_of_what_is_free(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2000, 80000))
    cuda = torch.device("cuda")
    assert fits(1000, cuda) and not fits(1001, cuda) and fits(1001, CPU)
    # 4 bytes a voxel of two channels of five images and 1 of two labels: 42 of 50 bytes
    cases = random_cases(2, 5, 10, channels=2), random_cases(3, 5, 10, channels=2)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2 * 2100 - 1, 80000))
    tensors = TrainingTensors(*cases, cuda)
    assert tensors.device == cuda and tensors.storage == CPU
    assert all(values.device == CPU for case in [*tensors.labelled, *tensors.unlabelled] for values in case)


POLICIES = [
    (Augmentation("crop", (4, 9, 5)), (9, 8, 7)),
    (Augmentation("crop_rotate_flip", (4, 9, 5)), (9, 8, 7)),
    (Augmentation("rotate_flip_resize", (16, 20)), (21, 18)),
]


def sampler(augmentation: Augmentation, shape: tuple[int, ...], device: torch.device) -> TrainingSampler:
    cases = random_cases(5, *shape, channels=2), random_cases(7, *shape, channels=2)
    return TrainingSampler(TrainingTensors(*cases, device), augmentation, 4, 6, 0)


@pytest.mark.parametrize(("augmentation", "shape"), POLICIES)
def test_nothing_is_read_back_from_the_device(augmentation, shape):
    """Tensors of the device meta hold no values: whoever asks for one raises."""
    batches = sampler(augmentation, shape, torch.device("meta"))
    for _ in range(8):
        image, label, unlabelled = batches.next()
        assert {tensor.device.type for tensor in (image, label, unlabelled)} == {"meta"}
        assert image.shape == (4, 2, *augmentation.patch) and label.shape == (4, *augmentation.patch)
        assert unlabelled.shape == (6, 2, *augmentation.patch) and label.dtype == torch.uint8


@pytest.mark.gpu
@pytest.mark.parametrize("resident", [True, False])
@pytest.mark.parametrize(("augmentation", "shape"), POLICIES)
def test_a_gpu_draws_the_batches_of_the_cpu(augmentation, shape, resident, monkeypatch):
    if not resident:
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (0, 0))
    on_cpu, on_gpu = sampler(augmentation, shape, CPU), sampler(augmentation, shape, torch.device("cuda"))
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = [on_gpu.next() for _ in range(12)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    exact = augmentation.name != "rotate_flip_resize"
    for batch in found:
        for one, other in zip(batch, on_cpu.next(), strict=True):
            assert one.device.type == "cuda" and (one.dtype, one.shape) == (other.dtype, other.shape)
            if exact:
                torch.testing.assert_close(one.cpu(), other, rtol=0, atol=0)
            elif one.dtype == torch.uint8:
                assert (one.cpu() != other).sum() <= 4  # places just between two pixels
            else:
                torch.testing.assert_close(one.cpu(), other, rtol=0, atol=2e-5)


def few_values(shape: tuple[int, ...], count: int, seed: int = 0) -> np.ndarray:
    """A channel of `count` values as those of a scan, the last of which only one voxel has."""
    random = np.random.default_rng(seed)
    values = ((np.arange(count) - 37) / random.uniform(20, 40)).astype(np.float32)
    image = values[random.integers(0, max(count - 1, 1), shape)]
    image.flat[random.integers(image.size)] = values[-1]
    return image


@pytest.mark.parametrize("closeness", [1, 1e-6])
@pytest.mark.parametrize("count", [1, 2, 200, 256])
def test_images_of_few_values_are_kept_in_a_quarter_of_the_memory(count, closeness):
    image = few_values((1, 30, 40, 50), count) * np.float32(closeness) + np.float32(1 - closeness)
    kept = compact(image)
    assert isinstance(kept, CompactImage) and kept.nbytes <= image.size + 4 * count
    torch.testing.assert_close(kept.expand(), torch.from_numpy(image), rtol=0, atol=0)


def test_every_channel_has_values_of_its_own():
    image = np.stack([few_values((30, 40, 50), 256, seed) for seed in range(3)])
    assert len(np.unique(image)) > 256
    kept, tensor = compact(image), torch.from_numpy(image)
    assert isinstance(kept, CompactImage) and kept.shape == image.shape and kept.nbytes <= image.size + 3 * 4 * 256
    box = slice(None), slice(3, 20), slice(5, 7), slice(0, 50, 3)
    for compact_form, expected in (
        (kept, tensor), (kept[box], tensor[box]), (kept.flip((2, 3)), tensor.flip((2, 3))),
        (kept.transpose(1, 3), tensor.transpose(1, 3)), (kept.transpose(1, 2)[box].flip((1,)), tensor.transpose(1, 2)[box].flip((1,))),
    ):  # fmt: skip
        assert compact_form.shape == expected.shape and torch.equal(compact_form.expand(), expected)
    image[2] = np.random.default_rng(0).random((30, 40, 50))
    assert compact(image).data_ptr() == image.ctypes.data


@pytest.mark.parametrize(
    "image", [few_values((1, 256, 216), 200), np.random.default_rng(0).random((1, 256, 216), np.float32)]
)
def test_no_temporary_is_larger_than_the_image(image):
    """Of more than a thousand slices they would leave holes of as many times their size in a heap that is kept."""
    with torch.profiler.profile(profile_memory=True) as profile:
        compact(image)
    allocated = [event.self_cpu_memory_usage for event in profile.events()]
    assert 0 < max(allocated) <= image.nbytes


@pytest.mark.parametrize(
    "image",
    [
        few_values((1, 30, 40, 50), 257),
        np.copysign(np.float32(0), few_values((1, 30, 40, 50), 200)),
        np.full((1, 30, 40, 50), np.nan, np.float32),
        np.zeros((1, 0, 4), np.float32),
        np.arange(20, dtype=np.float32).reshape(1, 4, 5),
    ],
    ids=["257 values", "signs of zero", "NaN", "empty", "small"],
)
def test_other_images_stay_as_they_are(image):
    kept = compact(image)
    assert isinstance(kept, torch.Tensor) and kept.data_ptr() == image.ctypes.data or image.size == 0
    np.testing.assert_array_equal(kept.numpy(), image)


@pytest.mark.parametrize(("augmentation", "shape"), POLICIES)
def test_compact_images_give_the_batches_of_the_images_themselves(augmentation, shape, monkeypatch):
    shape = tuple(4 * side for side in shape)

    def cases(count: int) -> list[Case]:
        label = np.zeros(shape, np.uint8)
        images = (np.stack([few_values(shape, 200, 2 * number + c) for c in range(2)]) for number in range(count))
        return [Case(str(number), image, label, None) for number, image in enumerate(images)]

    batches = TrainingSampler(TrainingTensors(cases(3), cases(5), CPU), augmentation, 2, 3, 0)
    assert isinstance(batches._tensors.labelled[0][0], CompactImage)
    monkeypatch.setattr("semiseg.data.training_tensors.compact", torch.from_numpy)
    expected = TrainingSampler(TrainingTensors(cases(3), cases(5), CPU), augmentation, 2, 3, 0)
    for _ in range(12):
        torch.testing.assert_close(batches.next(), expected.next(), rtol=0, atol=0)
