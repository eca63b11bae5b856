"""Configuration: YAML files that build on each other, `key=value` overrides, and the dataclasses they must fit."""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, asdict, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

import yaml

from semiseg.models.vnet import SIDE_MULTIPLE

CONFIG_FOLDER = Path(__file__).parent / "configs"
UNET_STAGES = 5
PRESETS = ("paper", "released")


@dataclass(frozen=True)
class DatasetConfig:
    """Which scans, and how many of them count as labelled."""

    name: str  # la, acdc, pancreas, own or phantom
    labelled: int  # training volumes (ACDC: patients) whose labels may be used, the first of the list
    augmentation: str  # a name semiseg.data.Augmentation knows
    root: str | None = None  # folder of the plain h5 layout; default $SEMISEG_DATA/LA, /ACDC, ...
    cohort_seed: int = 0  # phantom only: which cohort is generated


@dataclass(frozen=True)
class NetworkConfig:
    """The segmentation network."""

    name: str  # vnet (3D) or unet (2D)
    filters: tuple[
        int, ...
    ]  # channels; vnet: one number, at full resolution; unet: one a stage, finest first
    dropout: tuple[float, ...]  # vnet: one probability, before and after the decoder; unet: one a stage
    embedding_after_dropout: bool = False  # z is the classifier's input before (paper) or after its dropout

    @property
    def dimensions(self) -> int:
        """3 for volumes, 2 for slices."""
        return 3 if self.name == "vnet" else 2

    @property
    def bottleneck_width(self) -> int:
        """Channels of the coarsest features."""
        return self.filters[0] * SIDE_MULTIPLE if self.name == "vnet" else self.filters[-1]

    @property
    def sizes(self) -> dict[str, Any]:
        """Filters and dropout as the network's constructor takes them."""
        if self.name == "vnet":
            return {"filters": self.filters[0], "dropout": self.dropout[0]}
        return {"filters": self.filters, "dropout": self.dropout}


@dataclass(frozen=True)
class TrainingConfig:
    """What every method shares: patches, batches, the optimiser, the machine."""

    patch_size: tuple[int, ...]  # voxels
    labelled_batch: int
    unlabelled_batch: int
    learning_rate: float = 0.01
    momentum: float = 0.9
    weight_decay: float = 1e-4
    precision: str = "float32"  # bfloat16: autocast; auto: bfloat16 where that is quicker
    channels_last: bool = True
    cuda_graph: bool | None = None  # capture a step's work on the GPU once and replay it; none: where one GPU trains
    deterministic: bool = False  # the same numbers on every run on a GPU too, at the cost of speed there
    device: str = "auto"  # auto, cpu, cuda, cuda:1 ...
    checkpoint_minutes: float = 5.0  # between the states that --resume goes on from; 0: after every iteration


@dataclass(frozen=True)
class EvaluationConfig:
    """How a trained network is applied to whole volumes, and which checkpoint is reported."""

    stride: tuple[int, ...] | None  # sliding window, voxels; none for 2D: slice by slice
    validation_stride: tuple[int, ...] | None = None  # the same during training; none: half the patch
    batch: int = 4  # windows or slices a forward pass
    head: str = "linear"  # linear, prototype or mean
    largest_component: bool = False
    validation_interval: int = (
        0  # iterations; 0: only at the end. Used where the dataset has a validation split
    )
    select: str = "last"  # last, validation or test: the checkpoint results.json reports


@dataclass(frozen=True)
class Config:
    """A whole run."""

    dataset: DatasetConfig
    network: NetworkConfig
    method: Any  # the dataclass of methods/<name>.py
    training: TrainingConfig
    evaluation: EvaluationConfig
    name: str
    preset: str = "paper"
    seed: int = 0
    output: str | None = None  # the run directory; default runs/<name>, numbered if that exists


def config_names() -> list[str]:
    """Names of the configurations that come with the package."""
    return sorted(path.stem for path in CONFIG_FOLDER.glob("*.yaml"))


def load_config(name_or_path: str, overrides: Iterable[str] = ()) -> Config:
    """Read a configuration, the files it builds on, its preset and the overrides, and check every key.

    name_or_path: a name from `config_names()`, or the path of a YAML file.
    overrides: `section.key=value` with YAML values, applied last.
    Raises ValueError naming the key, what was given and what is accepted; FileNotFoundError for a missing file.
    """
    given = parse_overrides(overrides)
    preset = given.get("preset") or _merge_files(name_or_path, "paper").get("preset", "paper")
    if preset not in PRESETS:
        raise ValueError(f"preset is {preset!r}, accepted are {', '.join(PRESETS)}")
    values = _merge_files(name_or_path, preset)
    values = merge(values, given)
    values["preset"] = preset
    values.setdefault("name", Path(name_or_path).stem)
    return config_from_mapping(values)


def config_from_mapping(values: Mapping[str, Any]) -> Config:
    """Build and check a Config from nested mappings, as `config_to_mapping` gives them."""
    from semiseg.methods import METHODS

    values = dict(values)
    method = values.get("method")
    name = method.get("name") if isinstance(method, Mapping) else None
    if name not in METHODS:
        raise ValueError(f"method.name is {name!r}, accepted are {', '.join(METHODS)}")
    schemas = {"method": METHODS[name].Options}
    config = _build(Config, values, "", schemas)
    _check(config)
    METHODS[name].check(config)
    return config


def config_to_mapping(config: Config) -> dict[str, Any]:
    """The configuration as nested plain mappings, ready for YAML or JSON."""
    return _plain(asdict(config))


def _check(config: Config) -> None:
    dimensions = len(config.training.patch_size)
    if config.network.name not in ("vnet", "unet"):
        raise ValueError(f"network.name is {config.network.name!r}, accepted are vnet, unet")
    expected, stages = (3, 1) if config.network.name == "vnet" else (2, UNET_STAGES)
    for key in ("filters", "dropout"):
        if len(getattr(config.network, key)) != stages:
            raise ValueError(f"network.{key} has {len(getattr(config.network, key))} values, accepted for network.name="
                             f"{config.network.name} are {stages}")  # fmt: skip
    if dimensions != expected:
        raise ValueError(
            f"training.patch_size has {dimensions} sides, but network.name={config.network.name} takes {expected}"
        )
    if any(side % SIDE_MULTIPLE for side in config.training.patch_size):
        raise ValueError(
            f"training.patch_size is {config.training.patch_size}, accepted are multiples of {SIDE_MULTIPLE}"
        )
    evaluation = config.evaluation
    for key, stride in (("stride", evaluation.stride), ("validation_stride", evaluation.validation_stride)):
        if stride is not None and len(stride) != dimensions:
            raise ValueError(f"evaluation.{key} has {len(stride)} sides, accepted are {dimensions}")
    if evaluation.stride is None and evaluation.validation_stride is not None:
        raise ValueError(
            f"evaluation.validation_stride is {evaluation.validation_stride}, accepted is null where "
            "evaluation.stride is null"
        )
    if dimensions == 3 and evaluation.stride is None:
        raise ValueError("evaluation.stride is null, but a 3D network needs one stride a side")
    choices = {
        "training.precision": ("auto", "float32", "bfloat16"),
        "evaluation.head": ("linear", "prototype", "mean"),
        "evaluation.select": ("last", "validation", "test"),
    }
    positive = ["dataset.labelled", "training.patch_size", "training.labelled_batch", "evaluation.stride",
                "evaluation.validation_stride", "evaluation.batch", "training.learning_rate",
                "network.filters"]  # fmt: skip
    for key, accepted in choices.items():
        if _lookup(config, key) not in accepted:
            raise ValueError(f"{key} is {_lookup(config, key)!r}, accepted are {', '.join(accepted)}")
    if not config.training.checkpoint_minutes >= 0:
        raise ValueError(
            f"training.checkpoint_minutes is {config.training.checkpoint_minutes}, accepted are values from 0"
        )
    for key in positive:
        value = _lookup(config, key)
        numbers = value if isinstance(value, tuple) else (value,)
        if any(number is not None and not number > 0 for number in numbers):
            raise ValueError(f"{key} is {value}, accepted are values above 0")


def _lookup(config: Config, key: str) -> Any:
    section, name = key.split(".")
    return getattr(getattr(config, section), name)


def parse_overrides(overrides: Iterable[str]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise ValueError(f"override {override!r} is not of the form section.key=value")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError:
            raise ValueError(f"override {override!r}: the value is not YAML") from None
        for part in reversed(key.split(".")):
            value = {part: value}
        values = merge(values, value)
    return values


def read_mapping(path: Path) -> dict[str, Any]:
    """The keys and values of a YAML file. Raises ValueError naming the file where it holds anything else."""
    try:
        content = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid YAML: {str(error).splitlines()[0]}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no mapping of keys to values")
    return content


def _merge_files(name_or_path: str, preset: str) -> dict[str, Any]:
    """A file over the files it names as `base`, each with its own part of the preset."""
    content = read_mapping(_find(name_or_path))
    values: dict[str, Any] = {}
    bases = content.pop("base", [])
    for base in [bases] if isinstance(bases, str) else bases:
        values = merge(values, _merge_files(base, preset))
    presets = content.pop("presets", {}) or {}
    values = merge(values, content)
    return merge(values, presets.get(preset, {}))


def _find(name_or_path: str) -> Path:
    built_in = CONFIG_FOLDER / f"{name_or_path}.yaml"
    if built_in.is_file():
        return built_in
    path = Path(name_or_path)
    if path.is_file():
        return path
    close = difflib.get_close_matches(name_or_path, config_names(), n=1, cutoff=0.0)
    raise FileNotFoundError(
        f"configuration {name_or_path!r} is neither a file nor one of {', '.join(config_names())}"
        + (f"; the nearest is {close[0]}" if close else "")
    )


def merge(low: Mapping[str, Any], high: Mapping[str, Any]) -> dict[str, Any]:
    """`high` over `low`, section by section."""
    merged = dict(low)
    for key, value in high.items():
        old = merged.get(key)
        merged[key] = merge(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return merged


def _build(schema: type, values: Any, prefix: str, schemas: Mapping[str, type]) -> Any:
    if not isinstance(values, Mapping):
        raise ValueError(f"{prefix.rstrip('.') or 'configuration'} is {values!r}, expected a section of keys")
    hints = typing.get_type_hints(schema)
    known = {f.name: f for f in fields(schema)}
    for key in values:
        if key not in known:
            raise ValueError(
                f"unknown key {prefix}{key}; the nearest known one is {_nearest(prefix, key, schema, schemas)}"
            )
    arguments = {}
    for key, spec in known.items():
        if key not in values:
            if spec.default is MISSING and spec.default_factory is MISSING:
                raise ValueError(f"{prefix}{key} is missing")
            continue
        hint = schemas.get(prefix + key, hints[key])
        if isinstance(hint, type) and is_dataclass(hint):
            arguments[key] = _build(hint, values[key], f"{prefix}{key}.", schemas)
        else:
            arguments[key] = _convert(values[key], hint, prefix + key)
    return schema(**arguments)


def _nearest(prefix: str, key: str, schema: type, schemas: Mapping[str, type]) -> str:
    """The known dotted key most like the unknown one: in its section first, then anywhere."""
    local = difflib.get_close_matches(key, [f.name for f in fields(schema)], n=1, cutoff=0.6)
    if local:
        return prefix + local[0]
    everywhere = [f.name for f in fields(Config)]
    for section, hint in {**typing.get_type_hints(Config), **schemas}.items():
        if is_dataclass(hint):
            everywhere += [f"{section}.{f.name}" for f in fields(hint)]
    return difflib.get_close_matches(prefix + key, everywhere, n=1, cutoff=0.0)[0]


def _convert(value: Any, hint: Any, key: str) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        return _convert(value, next(a for a in arguments if a is not type(None)), key)
    if origin is tuple:
        if not isinstance(value, list | tuple) or not value:
            raise ValueError(f"{key} is {value!r}, expected a list such as [112, 112, 80]")
        return tuple(_convert(item, arguments[0], key) for item in value)
    if hint is float and isinstance(value, str):  # YAML 1.1 reads 1e-4 as text
        try:
            return float(value)
        except ValueError:
            pass
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is hint:
        return value
    raise ValueError(f"{key} is {value!r}, expected {hint.__name__}")


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value
