"""What the tables have in common: rows in groups, and where, how and at which commit they were measured."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

from semiseg.evaluation.tables import markdown_table

Results = dict[str, Any]  # of one results file
Row = dict[str, Any]
Key = TypeVar("Key")

NO_FIGURE = "–"


def groups(rows: Sequence[Row], key: Callable[[Row], Key]) -> Iterable[tuple[Key, list[Row]]]:
    """Rows that share a key, wherever they stand, in the order in which each key first appears."""
    grouped: dict[Key, list[Row]] = {}
    for row in rows:
        grouped.setdefault(key(row), []).append(row)
    return grouped.items()


def titled_tables(
    rows: Sequence[Row],
    title: Callable[[Row], str],
    heading: Sequence[str],
    cells: Callable[[Row], Sequence[str]],
    notes: str,
) -> str:
    """A table of the rows of each title, in which a row is a line, and the notes below the last."""
    tables = [
        f"{text}\n\n{markdown_table([heading, *map(cells, members)])}" for text, members in groups(rows, title)
    ]
    return "\n\n".join([*tables, notes])


def times(numbers: Iterable[int]) -> str:
    """Sides of a grid or a kernel."""
    return "×".join(map(str, numbers))


def machine(results: Results) -> str:
    """The processor, and how much of it was used."""
    where = results["environment"]
    return f"{where['cpu']}, {where['cores']} cores, {where['threads']} threads"


def versions(of: Mapping[str, str]) -> str:
    """Libraries and their versions."""
    return ", ".join(f"{name} {version}" for name, version in of.items())


def torch_version(results: Results) -> str:
    return f"torch {results['environment']['versions']['torch']}"


def origin(results: Results, *where: str) -> str:
    """On what a file was measured, at which commit and by which command."""
    commit = f"commit {results['environment']['commit']}"
    return f"{'; '.join([*where, commit])}; `{results['command']}`.{note(results)}"


def note(results: Results) -> str:
    """What is to be known of a measurement beside where and how it was made."""
    return f" {results['note']}" if "note" in results else ""
