"""Configurations as text: YAML files that build on each other, and `key=value` overrides, read into nested mappings."""

from __future__ import annotations

import difflib
import re
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import yaml

CONFIG_FOLDER = Path(__file__).parent / "configs"
Preset = Literal["paper", "released"]
PRESETS: tuple[str, ...] = typing.get_args(Preset)


def config_names() -> list[str]:
    """Names of the configurations that come with the package."""
    return sorted(path.stem for path in CONFIG_FOLDER.glob("*.yaml"))


def find_config(
    name_or_path: str,
    built_on_it: Path | None = None,  # the file that names it as its base
) -> Path:
    """The file of a configuration; that of a base is looked for beside the file that names it first.

    Raises FileNotFoundError naming the nearest.
    """
    shipped = CONFIG_FOLDER / f"{name_or_path}.yaml"
    if built_on_it is None:
        what, places = f"configuration {name_or_path!r} is neither a file", (shipped, Path(name_or_path))
    else:
        what = f"{built_on_it}: base {name_or_path!r} is neither a file beside it"
        places = built_on_it.parent / name_or_path, shipped
    for place in places:
        if place.is_file():
            return place
    close = difflib.get_close_matches(name_or_path, config_names(), n=1, cutoff=0.0)
    raise FileNotFoundError(
        f"{what} nor one of {', '.join(config_names())}" + (f"; the nearest is {close[0]}" if close else "")
    )


def read_config(path: Path, preset: str, chain: tuple[Path, ...] = ()) -> dict[str, Any]:
    """A file over the files it names as `base`, each with its own part of the preset.

    chain: the files that led to this one, each the base of the one before.
    Raises ValueError naming the file and what is wrong with it, FileNotFoundError for a missing base.
    """
    chain = (*chain, path.resolve())
    if chain[-1] in chain[:-1]:
        raise ValueError(
            f"{path} builds on itself: base leads from {' to '.join(map(str, chain))}, "
            "accepted are bases without a cycle"
        )
    content = read_mapping(path)
    bases = content.pop("base", [])
    names = [bases] if isinstance(bases, str) else bases
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(
            f"{path}: base is {bases!r}, accepted are a configuration's name or file, or a list of such"
        )
    presets = content.pop("presets", {})
    if not isinstance(presets, dict) or not all(
        key in PRESETS and isinstance(section, dict) for key, section in presets.items()
    ):
        raise ValueError(
            f"{path}: presets is {presets!r}, accepted are sections of keys named {', '.join(PRESETS)}"
        )
    values: dict[str, Any] = {}
    for name in names:
        values = merge(values, read_config(find_config(name, path), preset, chain))
    return merge(merge(values, content), presets.get(preset, {}))


def read_mapping(path: Path) -> dict[str, Any]:
    """The keys and values of a YAML file. Raises ValueError naming the file where it holds anything else."""
    content = _parse(path.read_bytes(), f"{path} cannot be read")
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no mapping of keys to values")
    return content


def parse_overrides(overrides: Iterable[str]) -> dict[str, Any]:
    """The nested mapping of `section.key=value` with YAML values. Raises ValueError naming the one that is none."""
    values: dict[str, Any] = {}
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise ValueError(f"override {override!r} is not of the form section.key=value")
        if not text.strip():
            raise ValueError(f"override {override!r} has no value; null says none")
        if " #" in text and text[0] not in "'\"":
            raise ValueError(
                f"override {override!r} holds ' #', where YAML begins a comment, accepted is a quoted text"
            )
        value = _parse(text, f"override {override!r}: the value is not YAML")
        for part in reversed(key.split(".")):
            value = {part: value}
        values = merge(values, value)
    return values


def merge(low: Mapping[str, Any], high: Mapping[str, Any]) -> dict[str, Any]:
    """`high` over `low`, section by section."""
    merged = dict(low)
    for key, value in high.items():
        old = merged.get(key)
        merged[key] = merge(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return merged


def _parse(text: str | bytes, failure: str) -> Any:
    """What a text holds. Raises ValueError with the failure and, in the same line, what is wrong and where."""
    try:
        return yaml.load(text, _Loader)
    except (yaml.YAMLError, ValueError) as error:  # ValueError: of dates and numbers that are none
        reason = str(error).splitlines()[0]
        if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
            reason = f"line {error.problem_mark.line + 1}: {error.problem}"
        raise ValueError(f"{failure}: {reason}") from None
    except RecursionError:
        raise ValueError(f"{failure}: it is nested too deeply") from None


class _Loader(yaml.SafeLoader):
    """YAML whose keys are texts, none of them twice in a section, where PyYAML would keep the last without a word.

    Numbers are decimal: to PyYAML 010 is 8 and 1:30 is 90.
    """

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        # Here, because later the keys that `<<` merges in stand among the section's own.
        node = super().compose_mapping_node(anchor)
        seen = set()
        scalars = [key for key, _ in node.value if isinstance(key, yaml.ScalarNode)]  # PyYAML refuses others
        for key in scalars:
            kind = key.tag.rpartition(":")[2]
            if kind not in ("str", "merge"):
                problem = f"key {key.value!r} is read as {kind}, accepted are names"
            elif key.value in seen:
                problem = f"key {key.value!r} is given twice, accepted is once in a section"
            else:
                seen.add(key.value)
                continue
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
        return node


INT, FLOAT = "tag:yaml.org,2002:int", "tag:yaml.org,2002:float"
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in (INT, FLOAT)]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(INT, re.compile(r"[-+]?(?:0|[1-9][0-9_]*)$"), list("-+0123456789"))
_Loader.add_implicit_resolver(
    FLOAT,
    re.compile(r"[-+]?(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9]+)(?:e[-+]?[0-9]+)?$|[-+]?\.inf$|\.nan$", re.IGNORECASE),
    list("-+0123456789."),
)
