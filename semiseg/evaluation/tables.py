"""Results as a Markdown table, legible on a console too."""

from collections.abc import Mapping, Sequence
from typing import Any

HEADINGS = {
    "dice": "Dice [%]",
    "jaccard": "Jaccard [%]",
    "hd95": "95HD [voxel]",
    "asd": "ASD [voxel]",
    "hd95_mm": "95HD [{unit}]",
    "assd_mm": "ASSD [{unit}]",
}
PERCENTAGES = ("dice", "jaccard")


def results_table(
    results: Mapping[str, Any],  # results.json
) -> str:
    """The reported checkpoint's table, then those of others, each under a line that says what it is.

    Entries are mean ± population standard deviation over the cases.
    """
    evaluation = results["evaluation"]
    components = (
        "only the largest component of each class" if evaluation["largest_component"] else "all components"
    )
    heading = (
        f"{results['name']}: {results['method']} ({results['preset']} preset) on {results['dataset']}, "
        f"{results['labelled']} labelled, seed {results['seed']}; {evaluation['head']} head, {components}"
    )
    parts = [heading, _checkpoint_table(results["checkpoint"], results)]
    if "warning" in results:
        parts.insert(1, f"WARNING: {results['warning']}")
    parts += [_checkpoint_table(name, result) for name, result in results["other_checkpoints"].items()]
    return "\n\n".join(parts)


def _checkpoint_table(name: str, result: Mapping[str, Any]) -> str:
    summary = result["summary"]
    cases = f"{summary['num_cases']} {'case' if summary['num_cases'] == 1 else 'cases'}"
    heading = f"checkpoint {name}, iteration {result['iteration']}, {cases}, mean ± standard deviation"
    return f"{heading}\n\n{summary_table(summary)}\n\n{empty_counts(summary)}"


def empty_counts(summary: Mapping[str, Any]) -> str:
    """How many predictions and truths of a summary hold no voxel of a class."""
    empties = [f"{summary[f'empty_{what}']} empty {what}s" for what in ("prediction", "truth")]
    return f"{', '.join(empties)} among all cases and classes"


def summary_table(
    summary: Mapping[str, Any],  # as `summarise` returns it
) -> str:
    """A row per class and one for their mean, a column per metric; Markdown with aligned columns."""
    return markdown_table(summary_rows(summary))


def summary_rows(summary: Mapping[str, Any]) -> list[list[str]]:
    """The cells of `summary_table`, headings first."""
    headings = metric_headings(summary["unit"])
    rows = {**summary["classes"], **({"mean": summary["mean"]} if len(summary["classes"]) > 1 else {})}
    return [
        ["class", *headings.values()],
        *([name, *(mean_and_sd(metric, row[metric]) for metric in headings)] for name, row in rows.items()),
    ]


def metric_headings(unit: str) -> dict[str, str]:
    """Headings of the metrics' columns; `unit` is that of a summary."""
    headings = {metric: text.format(unit=unit) for metric, text in HEADINGS.items()}
    if unit == "voxel":
        del headings["hd95_mm"]  # the same as hd95
    return headings


def scaled(metric: str, value: float) -> float:
    """A metric's value in the unit of its heading."""
    return 100 * value if metric in PERCENTAGES else value


def mean_and_sd(metric: str, statistics: Mapping[str, float]) -> str:
    """An entry of a table."""
    return f"{scaled(metric, statistics['mean']):.2f} ± {scaled(metric, statistics['sd']):.2f}"


def markdown_table(rows: Sequence[Sequence[str]]) -> str:
    """A heading and rows of cells in aligned columns, the first to the left, the others to the right."""
    rows = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    widths = [max(2, *map(len, column)) for column in zip(*rows, strict=True)]  # 2: a rule of `-:`
    lines = [
        "| " + " | ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) + " |"
        for row in rows
    ]
    rule = "| " + " | ".join(["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]) + " |"
    return "\n".join([lines[0], rule, *lines[1:]])
