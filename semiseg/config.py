"""Configuration: the dataclasses of its sections, and how the keys and values of files and overrides are checked."""

from __future__ import annotations

import difflib
import math
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import MISSING, asdict, dataclass, fields, is_dataclass
from typing import Annotated, Any, Literal

from semiseg.config_files import Preset, find_config, merge, parse_overrides, read_config
from semiseg.models.vnet import SIDE_MULTIPLE

UNET_STAGES = 5


@dataclass(frozen=True)
class Range:
    """The numbers a key accepts, as metadata of its type: Annotated[float, Range(0, 1)]."""

    low: int
    high: float = math.inf
    open_low: bool = False  # low itself is not accepted
    open_high: bool = False

    def __contains__(self, number: float) -> bool:
        above = self.low < number if self.open_low else self.low <= number
        return above and (number < self.high if self.open_high else number <= self.high)

    def __str__(self) -> str:
        if self.high == math.inf:
            return f"values {'above' if self.open_low else 'from'} {self.low}"
        if self.open_high:
            return f"values from {self.low} to below {self.high}"
        return f"{self.low}..{self.high}"


PositiveInt = Annotated[int, Range(1)]
NonNegativeInt = Annotated[int, Range(0)]
Seed = Annotated[int, Range(0, 2**63 - 1)]  # PyTorch's end at 2**64 - 1; a resumed run adds its iteration
PositiveFloat = Annotated[float, Range(0, open_low=True)]
NonNegativeFloat = Annotated[float, Range(0)]
Fraction = Annotated[float, Range(0, 1)]
FractionBelowOne = Annotated[float, Range(0, 1, open_high=True)]


@dataclass(frozen=True)
class DatasetConfig:
    """Which scans, and how many of them count as labelled."""

    name: Literal["la", "acdc", "pancreas", "own", "phantom"]
    labelled: PositiveInt  # training volumes (ACDC: patients) whose labels may be used, the first of the list
    augmentation: str  # a name semiseg.data.Augmentation knows
    root: str | None = None  # folder of the plain h5 layout; default $SEMISEG_DATA/LA, /ACDC, ...
    cohort_seed: Seed = 0  # phantom only: which cohort is generated


@dataclass(frozen=True)
class NetworkConfig:
    """The segmentation network."""

    name: Literal["vnet", "unet"]  # for volumes, for slices
    # channels; vnet: one number, at full resolution; unet: one a stage, finest first
    filters: tuple[PositiveInt, ...]
    # vnet: one probability, before and after the decoder; unet: one a stage
    dropout: tuple[FractionBelowOne, ...]
    embedding_after_dropout: bool = False  # z is the classifier's input before (paper) or after its dropout
    initialisation: Literal["he", "pytorch"] = "he"  # of convolutions; pytorch: a sixth of the variance

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
        """Filters and dropout as the network's constructor takes them, and that of its form with two decoders."""
        if self.name == "vnet":
            return {"filters": self.filters[0], "dropout": self.dropout[0]}
        return {"filters": self.filters, "dropout": self.dropout}

    @property
    def options(self) -> dict[str, Any]:
        """Everything the network's constructor takes of the configuration."""
        if self.name == "vnet":
            return {**self.sizes, "embedding_after_dropout": self.embedding_after_dropout}
        return self.sizes


@dataclass(frozen=True)
class TrainingConfig:
    """What every method shares: patches, batches, the optimiser, the machine."""

    patch_size: tuple[PositiveInt, ...]  # voxels
    labelled_batch: PositiveInt
    unlabelled_batch: NonNegativeInt
    learning_rate: PositiveFloat = 0.01
    momentum: Fraction = 0.9
    weight_decay: NonNegativeFloat = 1e-4
    # bfloat16: autocast; auto: bfloat16 where that is quicker
    precision: Literal["auto", "float32", "bfloat16"] = "float32"
    channels_last: bool = True
    # capture a step's work on the GPU once and replay it; null: where one GPU trains
    cuda_graph: bool | None = None
    deterministic: bool = False  # the same numbers on every run on a GPU too, at the cost of speed there
    device: str = "auto"  # auto, cpu, cuda, cuda:1 ...
    # between the states that --resume continues from; 0: after every iteration
    checkpoint_minutes: NonNegativeFloat = 5.0


@dataclass(frozen=True)
class EvaluationConfig:
    """How a trained network is applied to whole volumes, and which checkpoint is reported."""

    stride: tuple[PositiveInt, ...] | None  # sliding window, voxels; null, in 2D alone: slice by slice
    validation_stride: tuple[PositiveInt, ...] | None = None  # the same during training; null: half the patch
    batch: PositiveInt | None = None  # windows or slices a forward pass; null: of some four million voxels
    head: Literal["linear", "prototype", "mean"] = "linear"  # the classifier that predicts; mean: of both
    largest_component: bool = False
    # iterations; 0: only at the end. Used where the dataset has a validation split
    validation_interval: NonNegativeInt = 0
    select: Literal["last", "validation", "test"] = "last"  # the checkpoint results.json reports


@dataclass(frozen=True)
class Config:
    """A whole run."""

    dataset: DatasetConfig
    network: NetworkConfig
    method: Any  # the dataclass of methods/<name>.py
    training: TrainingConfig
    evaluation: EvaluationConfig
    name: str
    preset: Preset = "paper"
    seed: Seed = 0
    output: str | None = None  # the run directory; default runs/<name>, numbered if that exists


def load_config(name_or_path: str, overrides: Iterable[str] = ()) -> Config:
    """Read a configuration, the files it builds on, its preset and the overrides, and check every key.

    name_or_path: a name from `config_names()`, or the path of a YAML file.
    overrides: `section.key=value` with YAML values, applied last.
    Raises ValueError naming the key, what was given and what is accepted; FileNotFoundError for a missing file.
    """
    given = parse_overrides(overrides)
    path = find_config(name_or_path)
    own = _convert(read_config(path, "paper").get("preset", "paper"), Preset, "preset")
    preset = _convert(given.get("preset", own), Preset, "preset")
    values = read_config(path, preset)
    written = _convert(values.get("preset", preset), Preset, "preset")
    # Of a run's configuration, which has no sections for presets, another would be no more than a word in the results.
    if preset != written and values == read_config(path, written):
        raise ValueError(f"preset is {preset!r}, accepted for {name_or_path}, made with another, is {written}")
    values = merge(values, given)
    values["preset"] = preset
    values.setdefault("name", path.stem)
    config = config_from_mapping(values)
    # Not of a run that is trained already: its best checkpoint is there or is not.
    if config.evaluation.select != "last" and not config.evaluation.validation_interval:
        raise ValueError(
            f"evaluation.select is {config.evaluation.select}, accepted with evaluation.validation_interval=0 is last; "
            "set evaluation.validation_interval to choose among checkpoints"
        )
    return config


def overridden(
    config: Config,
    overrides: Iterable[str],  # `section.key=value` with YAML values
    accepted: Sequence[str],  # keys, and sections whose every key is accepted
) -> Config:
    """The configuration of a run with another value of some keys.

    Raises ValueError for a key that is not accepted, and as `config_from_mapping` does.
    """
    overrides = list(overrides)
    given = parse_overrides(overrides)
    for override in overrides:
        key = override.partition("=")[0]
        if not any(key == name or key.startswith(f"{name}.") for name in accepted):
            keys = ", ".join(name if "." in name else f"keys of {name}" for name in accepted)
            raise ValueError(f"override {override!r}, accepted for a run that exists are {keys}")
    return config_from_mapping(merge(config_to_mapping(config), given))


def config_from_mapping(values: Mapping[str, Any]) -> Config:
    """Build and check a Config from nested mappings, as `config_to_mapping` gives them."""
    from semiseg.methods import METHODS

    values = dict(values)
    _check_keys(Config, values, "", {})  # a misspelt `base` or `method` explains why there is no method.name
    method = values["method"] if isinstance(values.get("method"), Mapping) else {}
    name = method.get("name")
    if name not in tuple(METHODS):  # a mapping would raise TypeError for a list
        raise ValueError(f"method.name is {name!r}, accepted are {', '.join(METHODS)}")
    known = {other: {f.name for f in fields(METHODS[other].Options)} for other in METHODS}
    for key in method:
        others = [other for other in METHODS if key in known[other]]
        if others and name not in others:  # perhaps of a base, which the file at hand does not show
            raise ValueError(f"unknown key method.{key} with method.name={name}, accepted with {', '.join(others)}")
    schemas = {"method": METHODS[name].Options}
    config = _build(Config, values, "", schemas)
    _check(config)
    METHODS[name].check(config)
    return config


def config_to_mapping(config: Config) -> dict[str, Any]:
    """The configuration as nested plain mappings, ready for YAML or JSON."""
    return asdict(
        config,
        dict_factory=lambda items: {key: list(value) if isinstance(value, tuple) else value for key, value in items},
    )


def flatten(values: Mapping[Any, Any], divider: str = ".", prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one; the divider joins the keys that lead to a value."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        flat |= flatten(value, divider, f"{name}{divider}") if isinstance(value, Mapping) else {name: value}
    return flat


def _check(config: Config) -> None:
    if config.name in ("", ".", "..") or set(config.name) & set("/\\\0"):
        raise ValueError(f"name is {config.name!r}, accepted is the name of a folder")
    network, dimensions = config.network.name, config.network.dimensions
    stages = 1 if network == "vnet" else UNET_STAGES
    for key in ("filters", "dropout"):
        count = len(getattr(config.network, key))
        if count != stages:
            raise ValueError(f"network.{key} has {count} values, accepted for network.name={network} are {stages}")
    patch_size = config.training.patch_size
    if len(patch_size) != dimensions:
        raise ValueError(
            f"training.patch_size has {len(patch_size)} sides, accepted for network.name={network} are {dimensions}"
        )
    if any(side % SIDE_MULTIPLE for side in patch_size):
        raise ValueError(f"training.patch_size is {list(patch_size)}, accepted are multiples of {SIDE_MULTIPLE}")
    evaluation = config.evaluation
    for key, stride in (("stride", evaluation.stride), ("validation_stride", evaluation.validation_stride)):
        if stride is None:
            continue
        if len(stride) != dimensions:
            raise ValueError(f"evaluation.{key} has {len(stride)} sides, accepted are {dimensions}")
        if any(step > side for step, side in zip(stride, patch_size, strict=True)):
            raise ValueError(
                f"evaluation.{key} is {list(stride)}, accepted are on each axis 1 to the side of "
                f"training.patch_size, {list(patch_size)}"
            )
    if evaluation.stride is None and evaluation.validation_stride is not None:
        raise ValueError(
            f"evaluation.validation_stride is {list(evaluation.validation_stride)}, accepted is null where "
            "evaluation.stride is null"
        )
    if dimensions == 3 and evaluation.stride is None:
        raise ValueError(f"evaluation.stride is null, accepted for network.name={network} is one stride a side")


def _build(schema: type, values: Any, prefix: str, schemas: Mapping[str, type]) -> Any:
    if not isinstance(values, Mapping):
        raise ValueError(f"{prefix.rstrip('.') or 'configuration'} is {values!r}, accepted is a section of keys")
    _check_keys(schema, values, prefix, schemas)
    hints = typing.get_type_hints(schema, include_extras=True)
    arguments = {}
    for spec in fields(schema):
        key = spec.name
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


def _check_keys(schema: type, values: Mapping[str, Any], prefix: str, schemas: Mapping[str, type]) -> None:
    known = {f.name for f in fields(schema)}
    for key in values:
        if "." in key:
            section, _, name = key.partition(".")
            raise ValueError(f"unknown key {prefix}{key}, accepted in a file is {section}: {{{name}: ...}}")
        if key not in known:
            raise ValueError(
                f"unknown key {prefix}{key}; the nearest known one is {_nearest(prefix, key, schema, schemas)}"
            )


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
    if origin is Annotated:
        plain, accepted = arguments
        number = _convert(value, plain, key)
        if number not in accepted:
            raise ValueError(f"{key} is {number}, accepted are {accepted}")
        return number
    if origin is Literal:
        if value not in arguments:
            raise ValueError(f"{key} is {value!r}, accepted are {', '.join(arguments)}")
        return value
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        return _convert(value, next(a for a in arguments if a is not type(None)), key)
    if origin is tuple:
        if not isinstance(value, list | tuple) or not value:
            raise ValueError(f"{key} is {value!r}, accepted is a list such as [112, 112, 80]")
        return tuple(_convert(item, arguments[0], f"{key}[{index}]") for index, item in enumerate(value))
    if hint is float and isinstance(value, int | str) and not isinstance(value, bool):
        with suppress(ValueError, OverflowError):
            value = float(value)  # text too: YAML 1.1 reads 1e-4 as such
    if type(value) is not hint:
        raise ValueError(f"{key} is {value!r}, accepted is a value of type {hint.__name__}")
    if hint is float and not math.isfinite(value):
        raise ValueError(f"{key} is {value}, accepted are finite numbers")
    return value
