from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from h5_files import random_case, write_case

from semiseg.config import load_config
from semiseg.data import Augmentation, TrainingSampler, TrainingTensors, open_dataset
from semiseg.engine.trainer import train


@pytest.fixture
def pancreas(tmp_path: Path) -> Path:
    random = np.random.default_rng(0)
    for number in range(1, 6):
        write_case(
            tmp_path / "Pancreas_h5" / f"image{number:04d}_norm.h5", *random_case(random, (7, 9, 8), 2)
        )
    (tmp_path / "train.list").write_text("image0004\nimage0001\nimage0005\n")
    (tmp_path / "test.list").write_text("image0002\nimage0003\n")
    return tmp_path


def test_the_list_decides_what_is_labelled(pancreas):
    dataset = open_dataset("pancreas", pancreas)
    labelled, unlabelled = dataset.training_cases(1)
    assert [case.name for case in labelled] == ["image0004"]
    assert [case.name for case in unlabelled] == ["image0001", "image0005"]
    assert [case.name for case in dataset.evaluation_cases("test")] == ["image0002", "image0003"]
    assert dataset.class_names == ("background", "pancreas")
    assert (dataset.dimensions, dataset.has_validation) == (3, False)


def test_a_case_is_what_the_file_holds_at_one_millimetre(pancreas):
    case = open_dataset("pancreas", pancreas).training_cases(1)[0][0]
    with h5py.File(pancreas / "Pancreas_h5" / "image0004_norm.h5") as file:
        np.testing.assert_array_equal(case.image, file["image"][()][np.newaxis])
        np.testing.assert_array_equal(case.label, file["label"][()])
    assert (case.image.dtype, case.label.dtype, case.spacing) == (np.float32, np.uint8, (1.0, 1.0, 1.0))


def test_training_opens_no_test_file(pancreas, opened):
    opened.clear()
    open_dataset("pancreas", pancreas).training_cases(3)
    assert len(opened) == 3 and not any("image0002" in path or "image0003" in path for path in opened)


def test_what_is_refused(pancreas):
    dataset = open_dataset("pancreas", pancreas)
    with pytest.raises(ValueError, match="split is 'validation'; Pancreas has 'test' only"):
        dataset.evaluation_cases("validation")
    with pytest.raises(ValueError, match="dataset.labelled is 4, accepted are 1 to 3, the volumes that"):
        dataset.training_cases(4)
    (pancreas / "Pancreas_h5" / "image0003_norm.h5").unlink()
    with pytest.raises(FileNotFoundError, match="image0003_norm.h5: missing"):
        dataset.evaluation_cases("test")


def test_patches_larger_than_a_volume_are_padded(pancreas):
    tensors = TrainingTensors(*open_dataset("pancreas", pancreas).training_cases(2), torch.device("cpu"))
    sampler = TrainingSampler(tensors, Augmentation("crop", (16, 16, 16)), 2, 1, seed=0)
    image, label, other = sampler.next()
    assert image.shape == (2, 1, 16, 16, 16) and label.shape == (2, 16, 16, 16) and other.shape[0] == 1


def test_root_from_the_environment(pancreas, monkeypatch, tmp_path_factory):
    above = tmp_path_factory.mktemp("above")
    (above / "Pancreas").symlink_to(pancreas)
    monkeypatch.setenv("SEMISEG_DATA", str(above))
    assert len(open_dataset("pancreas").training_cases(1)[0]) == 1


def test_a_training_run_opens_no_test_file(pancreas, opened, tmp_path):
    config = tmp_path / "tiny.yaml"
    config.write_text("base: base/pancreas\nmethod: {name: supervised, iterations: 2}\n")
    opened.clear()
    train(load_config(str(config), [
        f"dataset.root={pancreas}", "dataset.labelled=1", "network.filters=[2]", f"output={tmp_path / 'run'}",
        "training.patch_size=[16, 16, 16]",
    ]))  # fmt: skip
    assert opened and not any("image0002" in path or "image0003" in path for path in opened)


def test_the_base_configuration_is_the_papers_protocol(tmp_path):
    config = tmp_path / "base.yaml"
    config.write_text("base: base/pancreas\nmethod: {name: supervised, iterations: 2}\n")
    loaded = load_config(str(config))
    assert loaded.training.patch_size == (96, 96, 96) and loaded.evaluation.stride == (16, 16, 16)
    assert (loaded.training.labelled_batch, loaded.training.unlabelled_batch) == (2, 2)
    assert (loaded.dataset.labelled, loaded.dataset.augmentation) == (12, "crop")
