"""Images that stay in their files: the same batches and the same training as from memory."""

from pathlib import Path

import h5py
import nifti_files as files
import numpy as np
import pytest
import torch
from h5_files import write_case
from safetensors.torch import load_file

from semiseg import memory
from semiseg.config import load_config
from semiseg.data import Augmentation, Case, TrainingSampler, TrainingTensors, UnlabelledCase, open_dataset
from semiseg.data import own as own_data
from semiseg.data.disk_image import DiskImage
from semiseg.engine.trainer import train
from semiseg.prepare import main as prepare

CPU = torch.device("cpu")
SIZES = [(7, 5, 4), (3, 6, 5), (4, 4, 6)]


@pytest.fixture(params=[1, 3], ids=["one channel", "three channels"])
def images(tmp_path, request) -> list[tuple[np.ndarray, Path]]:
    random = np.random.default_rng(0)
    arrays = [random.standard_normal((request.param, *size)).astype(np.float32) for size in SIZES]
    paths = [tmp_path / f"{number}.h5" for number in range(len(SIZES))]
    for array, path in zip(arrays, paths, strict=True):
        write_case(path, array[0] if request.param == 1 else array, None)
    return list(zip(arrays, paths, strict=True))


def test_it_gives_what_an_array_gives(images):
    for array, path in images:
        image, expected = DiskImage.open(path, 3, len(array)), torch.from_numpy(array)
        assert image.shape == expected.shape and image.nbytes == expected.nbytes
        for turned, tensor in ((image, expected), (image.transpose(1, 2), expected.transpose(1, 2))):
            assert turned.shape == tensor.shape
            assert torch.equal(turned.expand(), tensor) and torch.equal(turned.flip((1, 3)), tensor.flip((1, 3)))
            assert torch.equal(turned[:, 1:3, 0:2, 2:4], tensor[:, 1:3, 0:2, 2:4])
            assert torch.equal(turned.transpose(3, 1)[:, 1:3, 0:2, 2:3], tensor.transpose(3, 1)[:, 1:3, 0:2, 2:3])


def test_its_planes_are_the_slices_of_a_stack(images):
    for array, path in images:
        planes = DiskImage.open(path, 3, len(array)).planes()
        for plane, slices in zip(planes, array.swapaxes(0, 1), strict=True):
            expected = torch.from_numpy(slices)
            assert plane.shape == expected.shape and plane.nbytes == expected.nbytes
            assert torch.equal(plane.expand(), expected) and torch.equal(plane.flip((2,)), expected.flip((2,)))
            turned, tensor = plane.transpose(1, 2), expected.transpose(1, 2)
            assert torch.equal(turned.expand(), tensor) and torch.equal(turned[:, 1:4, 0:2], tensor[:, 1:4, 0:2])


def test_only_what_is_asked_for_is_read(tmp_path):
    with h5py.File(tmp_path / "large.h5", "w") as file:
        file.create_dataset("image", (10**5, 10**5, 10**3), np.float32)  # 40 TB that take no place yet
    image = DiskImage.open(tmp_path / "large.h5", 3).transpose(1, 2)
    assert torch.equal(image[:, 5:8, 99990:99992, 7:11], torch.zeros(1, 3, 2, 4))


@pytest.mark.parametrize("name", ["crop", "crop_dihedral", "crop_rotate_flip"])
@pytest.mark.parametrize("steps", [0, 1, 5])
def test_batches_and_saved_states_are_those_of_images_in_memory(images, name, steps):
    labelled = [Case("labelled", images[0][0], (images[0][0][0] > 0).astype(np.uint8), None)]
    in_memory = [UnlabelledCase("", array) for array, _ in images]
    on_disk = [UnlabelledCase("", DiskImage.open(path, 3, len(array))) for array, path in images]

    def sampler(unlabelled: list[UnlabelledCase]) -> TrainingSampler:
        tensors = TrainingTensors(labelled, unlabelled, CPU)
        assert tensors.on_disk == (unlabelled is on_disk)
        return TrainingSampler(tensors, Augmentation(name, (4, 3, 5)), 1, 2, seed=3)

    one, other = sampler(in_memory), sampler(on_disk)
    for _ in range(steps):
        one.next(), other.next()
    torch.testing.assert_close(other.state_dict(), one.state_dict(), rtol=0, atol=0)
    resumed = sampler(on_disk)
    resumed.next()
    resumed.load_state_dict(other.state_dict())
    for _ in range(5):
        expected = one.next()
        for batch in (other.next(), resumed.next()):
            for tensor, wanted in zip(batch, expected, strict=True):
                assert torch.equal(tensor, wanted)


def test_what_cannot_be_read_is_named(tmp_path, images):
    (array, path), *_ = images
    channels = len(array)
    with h5py.File(path, "a") as file:
        file["image"][..., 1, 1, 1] = np.nan
    image = DiskImage.open(path, 3, channels)
    assert torch.isfinite(image[:, 2:3, 0:1, 0:1]).all()
    with pytest.raises(ValueError, match=r"0.h5: 'image' holds NaN or infinity"):
        image.expand()
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"0.h5: missing"):
        image.expand()
    form = {1: r"\(3, 6, 5\); expected 2 axes", 3: r"\(3, 3, 6, 5\); expected 3 channels of 2 axes"}[channels]
    with pytest.raises(ValueError, match=rf"1.h5: 'image' has shape {form}"):
        DiskImage.open(images[1][1], 2, channels)


@pytest.fixture
def prepared(tmp_path) -> Path:
    images, labels = files.own_source(tmp_path / "source", 4, 3, (26, 34, 9))
    prepare(["own", str(images), str(labels), str(tmp_path / "prepared"), "--labelled", "2"])
    return tmp_path / "prepared"


def test_where_memory_does_not_suffice_training_is_the_same(prepared, tmp_path, monkeypatch, capsys):
    voxels = 26 * 34 * 9
    needed = 2 * 5 * voxels + 4 * 4 * voxels  # two labelled cases, four unlabelled ones
    overrides = ["network.filters=[2]", "training.patch_size=[32, 32, 16]", "training.labelled_batch=2",
                 "training.unlabelled_batch=2", "method.iterations=3", "method.pretraining_iterations=2",
                 "method.zero_box=[20, 20, 10]"]  # fmt: skip
    weights = {}
    for available, on_disk in ((2 * needed, False), (2 * needed - 1, True)):
        monkeypatch.setattr(own_data, "available_memory", lambda available=available: available)
        _, unlabelled = open_dataset("own", prepared).training_cases(2)
        assert len(unlabelled) == 4 and all(isinstance(case.image, DiskImage) == on_disk for case in unlabelled)
        config = load_config(str(prepared / "mper.yaml"), [*overrides, f"output={tmp_path / str(on_disk)}"])
        run = train(config)
        assert ("stay in their files" in capsys.readouterr().out) == on_disk
        weights[on_disk] = load_file(run.path / "last.safetensors")
    assert weights[True].keys() == weights[False].keys()
    assert all(torch.equal(weights[True][key], weights[False][key]) for key in weights[True])


def test_labelled_cases_that_take_too_much_memory_are_refused(prepared, monkeypatch):
    monkeypatch.setattr(own_data, "available_memory", lambda: 2 * 2 * 5 * 26 * 34 * 9 - 1)
    dataset = open_dataset("own", prepared)
    assert len(dataset.training_cases(1)[1]) == 5
    with pytest.raises(ValueError, match="dataset.labelled is 2, cases of .* GB, accepted are as many as take up to"):
        dataset.training_cases(2)


def test_memory_that_is_available(tmp_path, monkeypatch):
    limits = [tmp_path / name for name in ("max", "limit_in_bytes")]
    monkeypatch.setattr(memory, "LIMITS", tuple(map(str, limits)))
    information = tmp_path / "meminfo"
    monkeypatch.setattr(memory, "MEMORY_INFORMATION", information)
    whole = memory.machine_memory()
    assert memory.available_memory() == whole
    information.write_text("MemTotal:       9 kB\nMemFree:        5 kB\n")
    assert memory.available_memory() == whole
    information.write_text("MemTotal:       9999 kB\nMemAvailable:   5000 kB\nCached: 7 kB\n")
    assert memory.available_memory() == 5000 * 1024
    limits[0].write_text("max\n")
    limits[1].write_text("3000000\n")
    assert memory.available_memory() == 3e6
    limits[0].write_text("1000000\n")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert memory.available_memory() == 1e6 / 4
