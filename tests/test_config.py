"""Configurations: inheritance, presets, overrides, and what is refused."""

import subprocess
import sys

import pytest
import yaml

from semiseg.config import config_from_mapping, config_names, config_to_mapping, load_config

NAMES = config_names()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("preset", ["paper", "released"])
def test_every_configuration_loads_and_survives_yaml(name, preset):
    config = load_config(name, [f"preset={preset}"])
    assert config.name == name and config.preset == preset
    assert config_from_mapping(yaml.safe_load(yaml.safe_dump(config_to_mapping(config)))) == config


def test_every_dataset_has_its_configurations():
    for dataset in ("phantom", "la", "acdc"):
        assert {f"{dataset}_mper", f"{dataset}_supervised"} <= set(NAMES)
    assert {f"{d}_{m}_small" for d in ("la", "acdc") for m in ("mper", "supervised")} <= set(NAMES)


def test_la_paper_protocol():
    config = load_config("la_mper")
    assert config.training.patch_size == (112, 112, 80)
    assert (config.training.labelled_batch, config.training.unlabelled_batch) == (4, 4)
    assert (config.training.learning_rate, config.training.momentum, config.training.weight_decay) == (
        0.01,
        0.9,
        1e-4,
    )
    assert config.evaluation.stride == (18, 18, 4) and not config.evaluation.largest_component
    assert config.evaluation.select == "last" and config.evaluation.head == "linear"
    method = config.method
    assert (method.pretraining_iterations, method.iterations) == (2000, 15000)
    assert method.zero_box == (74, 74, 53) and method.contrast_weight == 0.02
    assert method.prototype_momentum == 0.999 and method.prototype_steps == "one"
    assert (method.num_prototypes, method.class_temperature, method.temperature) == (3, 0.1, 0.1)
    assert method.confidence == 0.9 and method.ramp_up_iterations == 6000 and method.ramp_up_step == 1
    assert method.learning_rate_step == 2500 and method.teacher_decay == 0.99 and method.teacher_buffers


def test_acdc_paper_protocol():
    config = load_config("acdc_mper")
    assert config.network.filters == (16, 32, 64, 128, 256) and config.training.patch_size == (256, 256)
    assert (config.training.labelled_batch, config.training.unlabelled_batch) == (12, 12)
    method = config.method
    assert (method.pretraining_iterations, method.iterations) == (10000, 30000)
    assert method.zero_box == (170, 170) and method.contrast_weight == 0.1
    assert method.ramp_up_iterations == 30000 and method.learning_rate_step is None


def test_released_preset_sets_the_table_s_column():
    la, acdc = load_config("la_mper", ["preset=released"]), load_config("acdc_mper", ["preset=released"])
    assert (la.method.pretraining_iterations, la.method.iterations) == (1300, 8000)
    assert la.evaluation.largest_component and la.evaluation.select == "test"
    assert not la.method.teacher_buffers and acdc.method.teacher_buffers
    assert (la.method.contrast_weight, acdc.method.contrast_weight) == (0.02, 0.001)
    assert (la.method.ramp_up_weight, acdc.method.ramp_up_weight) == (1.0, 0.5)
    for config in (la, acdc):
        method = config.method
        assert method.prototype_momentum == 0.99 and method.prototype_steps == "four"
        assert method.update_classes == "foreground" and method.update_requires_agreement
        assert (
            method.contrast_ignore_first and method.contrast_reduction == "sum" and method.ramp_up_step == 150
        )
        assert config.network.embedding_after_dropout


def test_small_configuration_keeps_its_size_under_released():
    config = load_config("la_mper_small", ["preset=released"])
    assert config.method.iterations == load_config("la_mper_small").method.iterations
    assert config.method.prototype_steps == "four"


def test_overrides_come_last():
    config = load_config("la_mper", ["method.prototype_momentum=0.5", "preset=released", "seed=7",
                                     "training.patch_size=[80, 80, 64]", "training.weight_decay=1e-3"])  # fmt: skip
    assert config.method.prototype_momentum == 0.5 and config.seed == 7
    assert config.training.patch_size == (80, 80, 64) and config.training.weight_decay == 1e-3


def test_file_with_base(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("base: phantom_mper\nmethod: {num_prototypes: 5}\n")
    config = load_config(str(path))
    assert config.name == "mine" and config.method.num_prototypes == 5


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "method.protoype_momentum=0.9",
            "unknown key method.protoype_momentum; the nearest known one is method.prototype_momentum",
        ),
        ("momentum=0.9", "nearest known one is"),
        ("training.labeled_batch=2", "training.labelled_batch"),
        ("method.name=mpr", "accepted are supervised, mper"),
        ("preset=best", "accepted are paper, released"),
        ("training.patch_size=[112, 112]", "takes 3"),
        ("training.patch_size=112", "expected a list"),
        ("training.labelled_batch=two", "expected int"),
        ("training.labelled_batch=0", "above 0"),
        ("evaluation.head=cosine", "accepted are linear, prototype, mean"),
        ("evaluation.select=best", "accepted are last, validation, test"),
        ("method.confidence=1.5", "method.confidence is 1.5"),
        ("method.contrast_positive=furthest", "accepted are nearest, label"),
        ("seed", "not of the form"),
        ("method=3", "method"),
    ],
)
def test_refusals(override, message):
    with pytest.raises(ValueError) as error:
        load_config("la_mper", [override])
    assert message in str(error.value)


def test_unknown_configuration_names_the_nearest():
    with pytest.raises(FileNotFoundError, match="nearest is la_mper"):
        load_config("la_mpr")


def test_a_refusal_is_one_line_and_a_status(tmp_path):
    command = [sys.executable, "-m", "semiseg.train", "method.prototype_momentun=1"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert result.returncode == 2
    assert result.stderr.strip().splitlines() == [
        "error: unknown key method.prototype_momentun; the nearest known one is method.prototype_momentum"
    ]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "name, stride, complaint",
    [
        ("la_mper", "[56,56]", "evaluation.validation_stride has 2 sides, accepted are 3"),
        (
            "la_mper",
            "[56,56,0]",
            "evaluation.validation_stride is \\(56, 56, 0\\), accepted are values above 0",
        ),
        ("acdc_mper", "[128,128]", "accepted is null where evaluation.stride is null"),
    ],
)
def test_validation_stride_is_checked(name, stride, complaint):
    with pytest.raises(ValueError, match=complaint):
        load_config(name, [f"evaluation.validation_stride={stride}"])
