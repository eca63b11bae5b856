"""Configurations: inheritance, presets, overrides, and what is refused."""

import re
import subprocess
import sys
from dataclasses import fields
from typing import get_args, get_type_hints

import pytest
import torch
import yaml

from semiseg.config import (
    DatasetConfig,
    EvaluationConfig,
    NetworkConfig,
    TrainingConfig,
    config_from_mapping,
    config_to_mapping,
    load_config,
)
from semiseg.config_files import config_names
from semiseg.data.dataset import ON_DISK
from semiseg.engine.trainer import choose_device
from semiseg.methods import METHODS
from semiseg.models import NETWORKS

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
    assert acdc.evaluation.select == "validation" and acdc.evaluation.validation_interval == 200
    assert not la.method.teacher_buffers and acdc.method.teacher_buffers
    assert not la.method.dice_squared and la.method.dice_per_image
    assert acdc.method.dice_squared and not acdc.method.dice_per_image
    assert (la.method.contrast_weight, acdc.method.contrast_weight) == (0.02, 0.001)
    assert (la.method.ramp_up_weight, acdc.method.ramp_up_weight) == (1.0, 0.5)
    for config in (la, acdc):
        assert config.network.initialisation == "pytorch"
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


def test_a_preset_without_sections_for_it_is_refused(tmp_path):
    """A run's configuration holds what its own preset made of every key."""
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config_to_mapping(load_config("phantom_mper"))))
    assert load_config(str(path), ["preset=paper"]).preset == "paper"
    with pytest.raises(ValueError, match=r"^preset is 'released', accepted for .*config\.yaml, .* is paper$"):
        load_config(str(path), ["preset=released"])


@pytest.mark.parametrize("preset", ["relased", ["paper"]])
@pytest.mark.parametrize("in_section", [False, True])
def test_the_preset_of_a_file_is_checked_where_an_override_gives_another(preset, in_section, tmp_path):
    path, content = tmp_path / "own.yaml", {"preset": preset}
    path.write_text(yaml.safe_dump({"base": "la_mper", **({"presets": {"released": content}} if in_section else content)}))
    with pytest.raises(ValueError, match=rf"^preset is {re.escape(repr(preset))}, accepted are paper, released$"):
        load_config(str(path), ["preset=released"])


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
        ("momentum=0.9", "unknown key momentum; the nearest known one is training.momentum"),
        ("training.labeled_batch=2", "training.labelled_batch"),
        ("method.name=mpr", "accepted are supervised, mper"),
        ("preset=best", "accepted are paper, released"),
        ("preset=null", "preset is None, accepted are paper, released"),
        ("preset=false", "preset is False, accepted are paper, released"),
        ("training.patch_size=[112, 112]", "training.patch_size has 2 sides, accepted for network.name=vnet are 3"),
        ("training.patch_size=112", "training.patch_size is 112, accepted is a list"),
        ("network.filters=[16, 32]", "network.filters has 2 values, accepted for network.name=vnet are 1"),
        ("network.name=unet", "network.filters has 1 values, accepted for network.name=unet are 5"),
        ("network.dropout=[0.5, 0.5]", "network.dropout has 2 values, accepted for network.name=vnet are 1"),
        ("training.labelled_batch=two", "training.labelled_batch is 'two', accepted is a value of type int"),
        ("training.labelled_batch=0", "training.labelled_batch is 0, accepted are values from 1"),
        ("training=3", "training is 3, accepted is a section of keys"),
        ("evaluation.stride=null", "evaluation.stride is null, accepted for network.name=vnet is one stride a side"),
        ("dataset.name=heart", "dataset.name is 'heart', accepted are la, acdc, pancreas, own, phantom"),
        ("network.name=resnet", "network.name is 'resnet', accepted are vnet, unet"),
        ("network.name=[vnet]", "network.name is ['vnet'], accepted are vnet, unet"),
        ("training.precision=float16", "training.precision is 'float16', accepted are auto, float32, bfloat16"),
        ("evaluation.head=cosine", "accepted are linear, prototype, mean"),
        ("network.initialisation=xavier", "accepted are he, pytorch"),
        ("evaluation.select=best", "accepted are last, validation, test"),
        ("method.confidence=1.5", "method.confidence is 1.5"),
        ("method.contrast_positive=furthest", "accepted are nearest, label"),
        ("seed", "not of the form"),
        ("seed=010", "seed is '010', accepted is a value of type int"),
        ("training.checkpoint_minutes=1:30", "checkpoint_minutes is '1:30', accepted is a value of type float"),
        ("output=", "override 'output=' has no value; null says none"),
        ("output=runs/a #2", "holds ' #', where YAML begins a comment"),
        (f"seed={'[' * 2000}", "the value is not YAML: it is nested too deeply"),
        ("name=''", "name is '', accepted is the name of a folder"),
        ("name=../a", "name is '../a', accepted is the name of a folder"),
        (r'name="a\0b"', r"name is 'a\x00b', accepted is the name of a folder"),
        ("method=3", "method.name is None, accepted are supervised, mper, vclipseg"),
        ("method.text=clip", "unknown key method.text with method.name=mper, accepted with vclipseg"),
        (
            "method.name=supervised",
            "unknown key method.prototype_momentum with method.name=supervised, accepted with mper",
        ),
    ],
)
def test_refusals(override, message):
    with pytest.raises(ValueError) as error:
        load_config("la_mper", [override])
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("bases: phantom_mper\n", "unknown key bases; the nearest known one is"),
        (
            "base: phantom_mper\nmethod.iterations: 5\n",
            r"unknown key method.iterations, accepted in a file is method: \{iterations: ...\}",
        ),
    ],
)
def test_keys_of_a_file_that_are_no_sections_are_refused(text, message, tmp_path):
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(ValueError, match=f"^{message}"):
        load_config(str(tmp_path / "mine.yaml"))


@pytest.mark.parametrize(
    ("section", "names"), [(DatasetConfig, (*ON_DISK, "phantom")), (NetworkConfig, tuple(NETWORKS))]
)
def test_whatever_can_be_built_can_be_named(section, names):
    assert get_args(get_type_hints(section)["name"]) == names


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
            r"evaluation.validation_stride\[2\] is 0, accepted are values from 1",
        ),
        ("acdc_mper", "[128,128]", "accepted is null where evaluation.stride is null"),
    ],
)
def test_validation_stride_is_checked(name, stride, complaint):
    with pytest.raises(ValueError, match=complaint):
        load_config(name, [f"evaluation.validation_stride={stride}"])


UNIT, POSITIVE, FROM_0, FROM_1 = "0..1", "values above 0", "values from 0", "values from 1"
BELOW_1, SEEDS, FINITE = "values from 0 to below 1", f"0..{2**63 - 1}", "finite numbers"


@pytest.mark.parametrize(
    ("name", "key", "value", "accepted"),
    [
        ("phantom_supervised", "seed", "99999999999999999999", SEEDS),
        ("phantom_supervised", "seed", "-1", SEEDS),
        ("phantom_supervised", "dataset.labelled", "0", FROM_1),
        ("phantom_supervised", "dataset.cohort_seed", "-1", SEEDS),
        ("phantom_supervised", "training.unlabelled_batch", "-1", FROM_0),
        ("phantom_supervised", "training.learning_rate", "0.0", POSITIVE),
        ("phantom_supervised", "training.learning_rate", ".inf", FINITE),
        ("phantom_supervised", "training.momentum", "-1.0", UNIT),
        ("phantom_supervised", "training.weight_decay", "-1.0", FROM_0),
        ("phantom_supervised", "training.weight_decay", ".nan", FINITE),
        ("phantom_supervised", "training.checkpoint_minutes", "-1.0", FROM_0),
        ("phantom_supervised", "evaluation.batch", "0", FROM_1),
        ("phantom_supervised", "evaluation.validation_interval", "-1", FROM_0),
        ("phantom_supervised", "method.iterations", "0", FROM_1),
        ("phantom_supervised", "method.learning_rate_step", "0", FROM_1),
        ("phantom_mper", "method.pretraining_iterations", "-5", FROM_0),
        ("phantom_mper", "method.iterations", "-5", FROM_1),
        ("phantom_mper", "method.contrast_weight", ".nan", FINITE),
        ("phantom_mper", "method.ramp_up_iterations", "-4", FROM_0),
        ("phantom_mper", "method.ramp_up_step", "0", FROM_1),
        ("phantom_mper", "method.ramp_up_weight", "-1.0", FROM_0),
        ("phantom_mper", "method.learning_rate_step", "-1", FROM_1),
        ("phantom_mper", "method.teacher_decay", "2.0", UNIT),
        ("phantom_mper", "method.num_prototypes", "0", FROM_1),
        ("phantom_mper", "method.class_temperature", "-1.0", POSITIVE),
        ("phantom_mper", "method.temperature", "0.0", POSITIVE),
        ("phantom_mper", "method.prototype_momentum", "1.5", UNIT),
        ("phantom_mper", "method.confidence", "1.0", BELOW_1),
        ("phantom_mper", "method.pseudo_label_weight", ".nan", FINITE),
        ("phantom_mper", "method.kmeans_batch", "0", FROM_1),
        ("phantom_vclipseg", "method.iterations", "0", FROM_1),
        ("phantom_vclipseg", "method.ramp_up_iterations", "-1", FROM_0),
        ("phantom_vclipseg", "method.ramp_up_step", "0", FROM_1),
        ("phantom_vclipseg", "method.learning_rate_step", "0", FROM_1),
        ("phantom_vclipseg", "method.labelled_weight", "-1.0", FROM_0),
        ("phantom_vclipseg", "method.consistency_weight", ".inf", FINITE),
        ("phantom_vclipseg", "method.prompt_width", "0", FROM_1),
        ("phantom_vclipseg", "method.fusion_kernel", "-1", FROM_1),
        ("phantom_vclipseg", "method.text_width", "0", FROM_1),
        ("phantom_vclipseg", "method.text_seed", "9223372036854775808", SEEDS),
    ],
)
def test_numbers_out_of_range(name, key, value, accepted):
    with pytest.raises(ValueError) as error:
        load_config(name, [f"{key}={value}"])
    assert str(error.value) == f"{key} is {yaml.safe_load(value)}, accepted are {accepted}"


@pytest.mark.parametrize(
    ("name", "key", "value", "accepted"),
    [
        ("phantom_supervised", "network.filters", "0", FROM_1),
        ("phantom_supervised", "network.dropout", "1.0", BELOW_1),
        ("phantom_supervised", "training.patch_size", "-16", FROM_1),
        ("phantom_mper", "method.zero_box", "0", FROM_1),
        ("phantom_vclipseg", "method.controller_widths", "0", FROM_1),
    ],
)
def test_numbers_out_of_range_in_a_list(name, key, value, accepted):
    with pytest.raises(ValueError) as error:
        load_config(name, [f"{key}=[{value}]"])
    assert str(error.value) == f"{key}[0] is {value}, accepted are {accepted}"


@pytest.mark.parametrize(("labelled", "unlabelled"), [(3, 3), (4, 2)])
def test_mper_pairs_images(labelled, unlabelled):
    with pytest.raises(ValueError, match="accepted for mper are two equal even numbers"):
        load_config("phantom_mper", [f"training.labelled_batch={labelled}", f"training.unlabelled_batch={unlabelled}"])


def test_a_loss_for_each_image_takes_batches_of_regions_that_can_be_numbered():
    batches = ["training.labelled_batch=258", "training.unlabelled_batch=258"]
    load_config("phantom_mper", batches)
    with pytest.raises(ValueError, match="labelled_batch is 258, accepted with method.dice_per_image are up to 256"):
        load_config("phantom_mper", [*batches, "method.dice_per_image=true"])


@pytest.mark.parametrize(
    "section",
    [
        DatasetConfig,
        NetworkConfig,
        TrainingConfig,
        EvaluationConfig,
        *(method.Options for method in METHODS.values()),
    ],
)
def test_every_number_has_a_range(section):
    """One without would be found out of range by a run that has trained for hours."""
    assert not [
        key.name for key in fields(section) if re.search(r"(?<!Annotated\[)\b(int|float)\b", key.type)
    ]


def test_the_limits_themselves_are_accepted():
    config = load_config(
        "phantom_mper",
        [f"seed={2**63 - 1}", "method.pretraining_iterations=0", "method.ramp_up_iterations=0",
         "method.prototype_momentum=1", "method.teacher_decay=0", "method.confidence=0", "training.momentum=0",
         "evaluation.stride=[48, 48, 32]", "evaluation.validation_stride=[1, 1, 32]"],
    )  # fmt: skip
    assert config.seed == 2**63 - 1 and config.method.pretraining_iterations == 0


@pytest.mark.parametrize("key", ["stride", "validation_stride"])
@pytest.mark.parametrize(
    ("name", "stride", "patch"),
    [("phantom_mper", "[24, 49, 16]", "[48, 48, 32]"), ("acdc_mper", "[257, 1]", "[256, 256]")],
)
def test_strides_that_leave_gaps(name, key, stride, patch):
    overrides = {"stride": f"evaluation.stride={patch}", key: f"evaluation.{key}={stride}"}
    with pytest.raises(ValueError) as error:
        load_config(name, overrides.values())
    accepted = f"on each axis 1 to the side of training.patch_size, {patch}"
    assert str(error.value) == f"evaluation.{key} is {stride}, accepted are {accepted}"


@pytest.mark.parametrize("preset", ["paper", "released"])
@pytest.mark.parametrize("name", NAMES)
def test_no_checkpoint_is_judged_by_finer_windows_than_the_last(name, preset):
    evaluation = load_config(name, [f"preset={preset}"]).evaluation
    if evaluation.validation_stride is not None:
        assert all(a >= b for a, b in zip(evaluation.validation_stride, evaluation.stride, strict=True))


@pytest.mark.parametrize("select", ["validation", "test"])
def test_selection_needs_checkpoints_to_choose_from(select):
    with pytest.raises(
        ValueError, match=f"evaluation.select is {select}, .* set evaluation.validation_interval"
    ):
        load_config("phantom_mper", [f"evaluation.select={select}"])
    chosen = load_config(
        "phantom_mper", [f"evaluation.select={select}", "evaluation.validation_interval=200"]
    )
    assert chosen.evaluation.select == select
    # That of a run whose network is trained: evaluation and prediction take the checkpoint that is there.
    values = config_to_mapping(load_config("phantom_mper"))
    values["evaluation"]["select"] = select
    assert config_from_mapping(values).evaluation.select == select


BASES = "a configuration's name or file, or a list of such"
SECTIONS = "sections of keys named paper, released"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("base: 5", f"own.yaml: base is 5, accepted are {BASES}"),
        ("base:", f"own.yaml: base is None, accepted are {BASES}"),
        ("base: [phantom_mper, 7]", f"own.yaml: base is ['phantom_mper', 7], accepted are {BASES}"),
        ("presets: foo", f"own.yaml: presets is 'foo', accepted are {SECTIONS}"),
        ("presets: {paper: 3}", f"own.yaml: presets is {{'paper': 3}}, accepted are {SECTIONS}"),
        ("presets: {papr: {}}", f"own.yaml: presets is {{'papr': {{}}}}, accepted are {SECTIONS}"),
        ("seed: 1\n1: x", "own.yaml cannot be read: line 2: key '1' is read as int, accepted are names"),
        ("on: x", "own.yaml cannot be read: line 1: key 'on' is read as bool, accepted are names"),
        ("method: {1: 2}", "own.yaml cannot be read: line 1: key '1' is read as int, accepted are names"),
        ("? [a]\n: 1", "own.yaml cannot be read: line 1: found unhashable key"),
        ("seed: 1\nname: a\nseed: 2", "own.yaml cannot be read: line 3: key 'seed' is given twice"),
        (
            "method:\n  iterations: 1\n  'iterations': 2",
            "own.yaml cannot be read: line 3: key 'iterations' is given",
        ),
        ("seed: [", "own.yaml cannot be read: line 1: expected the node content"),
        ("seed: 2024-13-45", "own.yaml cannot be read: month must be in 1..12"),
        ("method: {name: [a]}", "method.name is ['a'], accepted are supervised, mper"),
    ],
)
def test_mistakes_in_the_structure_of_a_file(content, message, tmp_path):
    path = tmp_path / "own.yaml"
    path.write_text(content)
    with pytest.raises(ValueError) as error:
        load_config(str(path))
    assert str(error.value).removeprefix(f"{tmp_path}/").startswith(message)
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("method.name=[mper]", "method.name is ['mper'], accepted are supervised, mper"),
        ("method={1: 2}", "override 'method={1: 2}': the value is not YAML: line 1: key '1' is read as int"),
        ("method={a: 1, a: 2}", "line 1: key 'a' is given twice"),
    ],
)
def test_mistakes_in_the_structure_of_an_override(override, message):
    with pytest.raises(ValueError) as error:
        load_config("phantom_mper", [override])
    assert message in str(error.value)


def test_merged_keys_may_be_overwritten(tmp_path):
    path = tmp_path / "own.yaml"
    path.write_text(
        "base: phantom_mper\ntraining: {<<: {momentum: 0.5, labelled_batch: 2}, labelled_batch: 4}\n"
    )
    training = load_config(str(path)).training
    assert (training.momentum, training.labelled_batch) == (0.5, 4)


@pytest.mark.parametrize(
    ("bases", "cycle"), [({"a": "a"}, "aa"), ({"a": "b", "b": "a"}, "aba"), ({"a": "b", "b": "b"}, "abb")]
)
def test_bases_that_lead_back(bases, cycle, tmp_path):
    for name, base in bases.items():
        (tmp_path / f"{name}.yaml").write_text(f"base: [phantom_mper, {base}.yaml]\n")
    chain = " to ".join(str(tmp_path / f"{name}.yaml") for name in cycle)
    with pytest.raises(ValueError) as error:
        load_config(str(tmp_path / "a.yaml"))
    asked = tmp_path / f"{cycle[-1]}.yaml"
    assert (
        str(error.value)
        == f"{asked} builds on itself: base leads from {chain}, accepted are bases without a cycle"
    )


def test_a_base_is_looked_for_beside_the_file_that_names_it(tmp_path, monkeypatch):
    folder, elsewhere = tmp_path / "configurations", tmp_path / "elsewhere"
    for place, seed in ((folder, 1), (elsewhere, 2)):
        place.mkdir()
        (place / "common.yaml").write_text(f"base: phantom_mper\nseed: {seed}\n")
    (folder / "own.yaml").write_text("base: common.yaml\n")
    (folder / "same.yaml").write_text("base: [common.yaml, common.yaml]\n")
    monkeypatch.chdir(elsewhere)
    assert load_config(str(folder / "own.yaml")).seed == 1
    assert load_config(str(folder / "same.yaml")).seed == 1

    (folder / "common.yaml").unlink()
    with pytest.raises(FileNotFoundError) as error:
        load_config(str(folder / "own.yaml"))
    message = f"{folder / 'own.yaml'}: base 'common.yaml' is neither a file beside it nor one of acdc_mper, "
    assert str(error.value).startswith(message)


@pytest.mark.parametrize(
    "name", ["mps", "meta", "cpu:3", "cpu:0", "cuda:-1", "cuda:01", "cuda:", "gpu", "CPU", ""]
)
def test_devices_that_are_none(name):
    with pytest.raises(ValueError) as error:
        choose_device(name)
    assert (
        str(error.value) == f"training.device is {name!r}, accepted are auto, cpu, cuda, cuda:0, cuda:1 ..."
    )


def test_devices(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    current = []
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    assert choose_device("cpu") == torch.device("cpu")
    assert choose_device("auto") == choose_device("cuda") == torch.device("cuda")
    assert current == []
    assert choose_device("cuda:1") == torch.device("cuda:1")
    assert current == [torch.device("cuda:1")], "what names no device must not use the first"
    with pytest.raises(ValueError, match="training.device is 'cuda:2', .* are auto, cpu, cuda, cuda:0, cuda:1$"):
        choose_device("cuda:2")
