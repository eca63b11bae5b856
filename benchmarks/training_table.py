"""Tables of trained networks for README.md and docs/, from the rows benchmarks/training_results.py gathers."""

from statistics import median
from typing import Any

import numpy as np

from semiseg.evaluation.tables import HEADINGS, scaled

METRICS = {metric: HEADINGS[metric] for metric in ("dice", "jaccard", "hd95", "asd")}
EMPTY = "empty: predictions without a voxel of a class; "


def training_header() -> list[str]:
    return ["configuration", "seeds", *METRICS.values(), "empty", "minutes"]


def evaluation_header() -> list[str]:
    how = "trained with", "checkpoint", "head", "components"
    return ["configuration", "labelled", "seed", *how, *METRICS.values(), "minutes"]


def evaluation_cells(row: dict[str, Any]) -> list[str]:
    """One line from one evaluation of one run: mean ± sd of cases."""
    evaluation = row["evaluation"]
    words = row["environment"]["command"].split()
    overrides = [word for word in words if "=" in word and not word.startswith("seed=")]
    return [
        row["name"],
        str(row["labelled"]),
        str(row["seed"]),
        ", ".join(overrides),
        row["checkpoint"],
        evaluation["head"],
        "largest" if evaluation["largest_component"] else "all",
        *(_entry(metric, [row["summary"]["mean"][metric]]) for metric in METRICS),
        f"{row['training_minutes']:.1f}",
    ]


def training_cells(rows: list[dict[str, Any]]) -> list[str]:
    """One line from the runs of one configuration: over one seed mean ± sd of cases, over several of seeds."""
    entries = [_entry(metric, [row["summary"]["mean"][metric] for row in rows]) for metric in METRICS]
    empty = sum(row["summary"]["empty_prediction"] for row in rows)
    minutes = median(row["training_minutes"] for row in rows)
    return [rows[0]["name"], str(len(rows)), *entries, str(empty), f"{minutes:.0f}"]


def _entry(metric: str, values: list[dict[str, float]]) -> str:
    means = [scaled(metric, value["mean"]) for value in values]
    deviation = np.std(means) if len(means) > 1 else scaled(metric, values[0]["sd"])
    return f"{np.mean(means):.2f} ± {deviation:.2f}"


def training_rows(results: dict[str, Any]) -> list[list[str]]:
    """A line per configuration, in the order of the file."""
    return [training_cells(rows) for rows in of_configurations(results)]


def of_configurations(results: dict[str, Any]) -> list[list[dict[str, Any]]]:
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in results["rows"]:
        groups.setdefault(row["name"], []).append(row)
    return list(groups.values())


def paired_rows(first: dict[str, Any], second: dict[str, Any]) -> list[list[str]]:
    """A line per configuration: mean Dice over the seeds that both files have, and the difference seed by seed."""
    dice: tuple[dict, dict] = {}, {}
    for of_file, results in zip(dice, (first, second), strict=True):
        for row in results["rows"]:
            of_file.setdefault(row["name"], {})[row["seed"]] = 100 * row["summary"]["mean"]["dice"]["mean"]
    lines = []
    for name in (name for name in dice[0] if name in dice[1]):
        seeds = sorted(dice[0][name].keys() & dice[1][name].keys())
        one, other = (np.array([of_file[name][seed] for seed in seeds]) for of_file in dice)
        error = np.std(other - one, ddof=1) / np.sqrt(len(seeds))
        figures = (f"{value:.2f}" for value in (one.mean(), other.mean(), (other - one).mean(), error))
        lines.append([name, str(len(seeds)), *figures, f"{one.min():.2f}", f"{other.min():.2f}"])
    return lines


def training_notes(
    results: dict[str, Any],
    header: list[str],  # the columns to explain
) -> str:
    """What stands below a table."""
    commits: dict[str, dict[str, None]] = {}  # of a machine, in the order of the file
    for where in (row["environment"] for row in results["rows"]):
        machine = f"{where['gpu']['name'] if 'gpu' in where else where['cpu']}, torch {where['versions']['torch']}"
        commits.setdefault(machine, {})[where["commit"]] = None
    machines = "; ".join(f"{machine}, commit {', '.join(of_machine)}" for machine, of_machine in commits.items())
    of_seeds = [len(rows) > 1 for rows in of_configurations(results)] if "seeds" in header else [False]
    spread = "seeds' means or, of a single seed, the cases" if any(of_seeds) else "cases"
    if all(of_seeds):
        spread = "seeds' means"
    minutes = "all iterations at the median pace of their stage"
    if "seeds" in header:
        minutes += ", the median training, on a machine that ran other work beside it"
    texts = sorted({row["text"]["source"] for row in results["rows"] if "text" in row})
    text = f" Text embeddings: {', '.join(texts)}." if texts else ""
    checkpoints = sorted({row["checkpoint"] for row in results["rows"]})
    checkpoint = "" if "checkpoint" in header else f"Checkpoint: {', '.join(checkpoints)}. "
    return (
        f"{checkpoint}Mean over classes and cases ± standard deviation of the {spread}; 95HD and ASD as "
        f"medpy defines them; {EMPTY if 'empty' in header else ''}minutes: {minutes}. {machines}.{text}"
    )
