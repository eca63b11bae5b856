"""Regenerate the README's tables from benchmarks/results: python benchmarks/tables.py

A table stands between <!-- table:NAME --> and <!-- /table -->. TABLES says how each name is made from its
results, the JSON in benchmarks/results/NAME.json.
"""

import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

from training_table import training_header, training_notes, training_rows

from semiseg.evaluation.tables import markdown_table

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
RESULTS = ROOT / "benchmarks" / "results"
MARKED = re.compile(r"(<!-- table:([\w-]+) -->\n).*?(<!-- /table -->)", re.DOTALL)

Results = dict[str, Any]
Row = dict[str, Any]
Key = TypeVar("Key")


def kernel_table(results: Results) -> str:
    """Medians in ms, how many times slower the others are, and extra peak memory, per operation and size."""
    tables = [
        f"{title}\n\n{markdown_table([KERNEL_HEADING, *map(kernel_cells, rows)])}"
        for title, rows in groups(results["rows"], key=kernel_title)
    ]
    return "\n\n".join([*tables, kernel_notes(results)])


KERNEL_HEADING = (
    "operation", "C++", "eager", "compiled", "eager / C++", "compiled / C++", "C++ / traffic",
    "MB C++", "MB eager", "MB compiled",
)  # fmt: skip


def kernel_title(row: Row) -> str:
    size = "×".join(map(str, row["spatial"]))
    return (
        f"B = {row['batch']}, {size} voxels, d = {row['d']}, C = {row['num_classes']}, "
        f"K = {row['per_class']}, float32; allocator: {row['allocator']}"
    )


def kernel_cells(row: Row) -> list[str]:
    cpu, eager, compiled = (row["contestants"][name] for name in ("cpu", "eager", "compiled"))
    return [
        f"{row['operation']} {row['part']}",
        *(f"{contestant['median_ms']:.1f}" for contestant in (cpu, eager, compiled)),
        *(f"{contestant['over_cpu']:.1f}" for contestant in (eager, compiled)),
        f"{cpu['over_compulsory']:.1f}",
        *(f"{contestant['extra_peak_mb']:.0f}" for contestant in (cpu, eager, compiled)),
    ]


def kernel_notes(results: Results) -> str:
    where = results["environment"]
    versions = ", ".join(f"{name} {version}" for name, version in where["versions"].items())
    return (
        f"Median milliseconds of {results['rows'][0]['rounds']} rounds in which the contestants took turns; "
        "eager and compiled are the reference as it is and under torch.compile; a step is both passes. "
        "C++ / traffic: the time over that of the traffic no implementation can avoid, measured in "
        "the same rounds: forward a plain read of the input (torch.sum), backward a read and a write (fill), "
        "a step two reads and a write. MB: extra peak memory, results and gradient included. "
        f"{where['cpu']}, {where['cores']} cores, {where['threads']} threads; {versions}; "
        f"commit {where['commit']}; `{results['command']}`."
    )


def training_table(results: Results) -> str:
    rows = [training_header(), *training_rows(results)]
    return f"{markdown_table(rows)}\n\n{training_notes(results)}"


def groups(rows: list[Row], key: Callable[[Row], Key]) -> Iterable[tuple[Key, list[Row]]]:
    """Rows that share a key, wherever they stand, in the order in which each key first appears."""
    grouped: dict[Key, list[Row]] = {}
    for row in rows:
        grouped.setdefault(key(row), []).append(row)
    return grouped.items()


TABLES: dict[str, Callable[[Results], str]] = {
    "cpu-kernels": kernel_table,
    "cpu-kernels-default-allocator": kernel_table,
    "phantom": training_table,
    "la": training_table,
    "acdc": training_table,
}


def read_results(folder: Path = RESULTS) -> dict[str, Results]:
    return {file.stem: json.loads(file.read_text()) for file in sorted(folder.glob("*.json"))}


def fill(text: str, results: dict[str, Results]) -> str:
    """The text with every marked table made anew; a table whose results are not there yet is empty."""

    def replace(match: re.Match[str]) -> str:
        start, name, end = match.groups()
        if name not in TABLES:
            raise ValueError(f"the text marks the table {name!r}, accepted are {', '.join(TABLES)}")
        return f"{start}{TABLES[name](results[name])}\n{end}" if name in results else f"{start}{end}"

    return MARKED.sub(replace, text)


if __name__ == "__main__":
    README.write_text(fill(README.read_text(), read_results()))
