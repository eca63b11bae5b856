"""The table says what results.json says."""

import numpy as np
import pytest

from semiseg.evaluation.metrics import case_metrics, summarise
from semiseg.evaluation.tables import markdown_table, results_table, summary_table


def summary(names: tuple[str, ...], spacing=None) -> dict:
    truth = np.zeros((8, 9, 10), np.uint8)
    truth[2:6, 2:6, 2:6] = 1
    if len(names) > 2:
        truth[6] = 2
    return summarise(
        {str(k): case_metrics(np.roll(truth, k, axis=1), truth, names, spacing) for k in range(3)}
    )


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


@pytest.mark.parametrize("spacing", [None, (1.0, 1.0, 2.0)])
def test_summary_table(spacing):
    values = summary(("background", "cube", "plane"), spacing)
    head, rule, *rows = summary_table(values).splitlines()
    unit = "voxel" if spacing is None else "mm"
    assert cells(head)[:5] == ["class", "Dice [%]", "Jaccard [%]", "95HD [voxel]", "ASD [voxel]"]
    assert cells(head)[5:] == ([] if spacing is None else ["95HD [mm]"]) + [f"ASSD [{unit}]"]
    assert [cells(row)[0] for row in rows] == ["cube", "plane", "mean"]
    assert len({len(line) for line in (head, rule, *rows)}) == 1
    dice = values["classes"]["cube"]["dice"]
    assert cells(rows[0])[1] == f"{100 * dice['mean']:.2f} ± {100 * dice['sd']:.2f}"
    asd = values["mean"]["asd"]
    assert cells(rows[2])[4] == f"{asd['mean']:.2f} ± {asd['sd']:.2f}"


def test_one_class_has_no_row_for_the_mean():
    rows = summary_table(summary(("background", "cube"))).splitlines()[2:]
    assert [cells(row)[0] for row in rows] == ["cube"]


@pytest.mark.parametrize("largest_component", [False, True])
def test_results_table(largest_component):
    results = {
        "name": "la_mper",
        "method": "mper",
        "preset": "released",
        "dataset": "la",
        "labelled": 8,
        "seed": 3,
        "evaluation": {"head": "mean", "largest_component": largest_component},
        "checkpoint": "test",
        "warning": "selected on the test set",
        "iteration": 17000,
        "summary": summary(("background", "left atrium")),
        "other_checkpoints": {
            "last": {"iteration": 18000, "summary": summary(("background", "left atrium"))}
        },
    }
    text = results_table(results)
    for part in (
        "la_mper",
        "mper (released preset) on la",
        "8 labelled",
        "seed 3",
        "mean head",
        "iteration 17000",
    ):
        assert part in text
    assert ("only the largest component" in text) == largest_component
    assert "WARNING: selected on the test set" in text
    assert text.count("left atrium") == 2
    assert text.index("checkpoint test") < text.index("checkpoint last, iteration 18000")
    assert "0 empty predictions, 0 empty truths" in text


def test_a_table_of_narrow_columns_and_bars_is_markdown():
    table = markdown_table([["class", "p"], ["left|right", "1"]])
    assert table.splitlines() == ["| class       |  p |", "| ----------- | -: |", "| left\\|right |  1 |"]
