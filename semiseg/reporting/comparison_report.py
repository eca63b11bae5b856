"""Several runs against each other, for the console and as a page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from semiseg.atomic import write_text
from semiseg.evaluation.figures import difference_figure
from semiseg.evaluation.tables import markdown_table, mean_and_sd, metric_headings, scaled
from semiseg.reporting.comparison import Difference, EvaluatedRun, SeedGroup, paired_difference, seed_groups
from semiseg.reporting.page import Picture, render

SPREAD = (
    "Mean over classes and cases ± standard deviation: of the seeds' means where there are several seeds, else of the "
    "cases. Empty: predictions without a voxel of a class, of all seeds."
)
TEST = (
    "Case by case, mean ± standard deviation over the cases; the scores of a configuration's seeds are averaged first. "
    "p: Wilcoxon signed-rank test, two-sided, not corrected for the number of comparisons."
)


def write_comparison(runs: Sequence[EvaluatedRun], output: Path) -> str:
    """Write a page that compares runs with the first, and return its tables for the console.

    ValueError where they were not tested on the same cases.
    """
    groups = seed_groups(runs)
    first, results = groups[0].label, runs[0].results
    cases, classes = list(results["cases"]), list(results["classes"][1:])
    headings = metric_headings(results["summary"]["unit"])
    rows = _mean_rows(groups, cases, classes, headings)
    differences = _difference_rows(groups, cases, classes, headings)
    of_classes = _class_rows(groups, cases, classes)
    title = f"Comparison on {results['dataset']}, {len(cases)} test cases"
    figure = difference_figure(
        cases,
        {group.label: _dice(group, cases, classes) - _dice(groups[0], cases, classes) for group in groups[1:]},
    )
    page = render(
        "comparison.html",
        title=title,
        subtitle=f"{len(runs)} runs",
        rows=rows,
        spread=SPREAD,
        first=first,
        differences=differences,
        test=TEST,
        figure=Picture.of_figure(figure, f"Difference of every case's Dice from {first}; above 0 is better"),
        of_classes=of_classes,
        cases=_dice_rows(groups, cases, classes),
        runs=_run_rows(groups),
    )
    write_text(output, page)
    tables = [markdown_table(rows), SPREAD, f"Differences from {first}", markdown_table(differences), TEST]
    if len(classes) > 1:
        tables += ["Dice of every class [%]", markdown_table(of_classes)]
    return "\n\n".join([title, *tables])


def _mean_rows(
    groups: Sequence[SeedGroup], cases: Sequence[str], classes: Sequence[str], headings: Mapping[str, str]
) -> list[list[str]]:
    rows = [["configuration", "seeds", *headings.values(), "empty"]]
    for group in groups:
        entries = [mean_and_sd(metric, group.statistics(metric, cases, classes)) for metric in headings]
        empty = sum(run.results["summary"]["empty_prediction"] for run in group.runs)
        rows.append([group.label, str(len(group.runs)), *entries, str(empty)])
    return rows


def _difference_rows(
    groups: Sequence[SeedGroup], cases: Sequence[str], classes: Sequence[str], headings: Mapping[str, str]
) -> list[list[str]]:
    rows = [["configuration", "metric", "difference", "p", "better", "worse", "equal"]]
    for group in groups[1:]:
        for metric, heading in headings.items():
            result = _difference(groups[0], group, metric, cases, classes)
            equal = len(cases) - result.better - result.worse
            counts = [str(count) for count in (result.better, result.worse, equal)]
            rows.append([group.label, heading, *_difference_cells(metric, result), *counts])
    return rows


def _difference(
    first: SeedGroup, other: SeedGroup, metric: str, cases: Sequence[str], classes: Sequence[str]
) -> Difference:
    scores = [group.scores(metric, cases, classes).mean(axis=0) for group in (first, other)]
    return paired_difference(scores[0], scores[1], metric)


def _difference_cells(metric: str, difference: Difference) -> list[str]:
    mean, sd = scaled(metric, difference.mean), scaled(metric, difference.sd)
    return [f"{mean:+.2f} ± {sd:.2f}", f"{difference.p:.2g}"]


def _class_rows(groups: Sequence[SeedGroup], cases: Sequence[str], classes: Sequence[str]) -> list[list[str]]:
    rows = [["class", groups[0].label]]
    for group in groups[1:]:
        rows[0] += [group.label, "difference", "p"]
    for name in classes:
        means = [mean_and_sd("dice", group.statistics("dice", cases, [name])) for group in groups]
        rows.append([name, means[0]])
        for group, mean in zip(groups[1:], means[1:], strict=True):
            difference = _difference(groups[0], group, "dice", cases, [name])
            rows[-1] += [mean, *_difference_cells("dice", difference)]
    return rows


def _dice_rows(groups: Sequence[SeedGroup], cases: Sequence[str], classes: Sequence[str]) -> list[list[str]]:
    dice = [_dice(group, cases, classes) for group in groups]
    rows = [["case", groups[0].label]]
    for group in groups[1:]:
        rows[0] += [group.label, "difference"]
    for case, first, *others in zip(cases, *dice, strict=True):
        entries = [entry for other in others for entry in (f"{other:.2f}", f"{other - first:+.2f}")]
        rows.append([case, f"{first:.2f}", *entries])
    return rows


def _dice(
    group: SeedGroup, cases: Sequence[str], classes: Sequence[str]
) -> np.ndarray:  # [cases], percent
    return 100 * group.scores("dice", cases, classes).mean(axis=0)


def _run_rows(groups: Sequence[SeedGroup]) -> list[list[str]]:
    return [
        ["configuration", "run", "seed", "checkpoint", "iteration", "Dice [%]"],
        *(
            [
                group.label,
                str(run.path),
                *(str(run.results[key]) for key in ("seed", "checkpoint", "iteration")),
                mean_and_sd("dice", run.results["summary"]["mean"]["dice"]),
            ]
            for group in groups
            for run in group.runs
        ),
    ]
