"""Tables of trained networks, from the rows benchmarks/training_results.py gathers."""

from collections.abc import Sequence
from statistics import median

import numpy as np
from table_parts import NO_FIGURE, Results, Row, groups, note, torch_version

from semiseg.evaluation.tables import HEADINGS, markdown_table, scaled

METRICS = {metric: HEADINGS[metric] for metric in ("dice", "jaccard", "hd95", "asd")}
TRAINING_HEADING = ("configuration", "seeds", *METRICS.values(), "empty", "minutes")
EVALUATION_HEADING = (
    "configuration", "labelled", "seed", "trained with", "checkpoint", "head", "components", *METRICS.values(), "minutes",
)  # fmt: skip
SAME = ("preset", "labelled", "checkpoint", "evaluation")  # in the runs of one line
DEVIATION = "Mean over classes and cases ± standard deviation of the"
MEDPY = "95HD and ASD as medpy defines them"
MINUTES = "minutes: all iterations at the median pace of their stage"


def training_table(
    results: Results,
    circumstances: str = "",  # of the trainings, which their minutes show
) -> str:
    """A line a configuration: over one seed mean ± sd of cases, over several of seeds."""
    configurations = of_configurations(results["rows"])
    of_seeds = [len(rows) > 1 for rows in configurations]
    spread = "seeds' means or, of a single seed, the cases" if any(of_seeds) else "cases"
    if all(of_seeds):
        spread = "seeds' means"
    checkpoints = ", ".join(sorted({row["checkpoint"] for row in results["rows"]}))
    return (
        f"{markdown_table([TRAINING_HEADING, *map(training_cells, configurations)])}\n\n"
        f"Checkpoint: {checkpoints}. {DEVIATION} {spread}; {MEDPY}; empty: predictions without a voxel of a class; "
        f"{MINUTES}, the median training{circumstances}. {trained_on(results)}"
    )


def training_cells(rows: Sequence[Row]) -> list[str]:
    entries = [_entry(metric, [row["summary"]["mean"][metric] for row in rows]) for metric in METRICS]
    empty = sum(row["summary"]["empty_prediction"] for row in rows)
    minutes = median(row["training_minutes"] for row in rows)
    return [rows[0]["name"], str(len(rows)), *entries, str(empty), f"{minutes:.0f}"]


def evaluations_table(results: Results) -> str:
    """A line a way to evaluate a trained network: mean ± sd of cases."""
    return (
        f"{markdown_table([EVALUATION_HEADING, *map(evaluation_cells, results['rows'])])}\n\n"
        f"{DEVIATION} cases; {MEDPY}; {MINUTES}. {trained_on(results)}{note(results)}"
    )


def evaluation_cells(row: Row) -> list[str]:
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


def _entry(metric: str, values: Sequence[dict[str, float]]) -> str:
    means = [scaled(metric, value["mean"]) for value in values]
    deviation = np.std(means) if len(means) > 1 else scaled(metric, values[0]["sd"])
    return f"{np.mean(means):.2f} ± {deviation:.2f}"


def paired_table(before: Results, after: Results, names: tuple[str, str]) -> str:
    """What training in another way changes, over the seeds that both files have; `names` are those of the two ways."""
    first, second = names
    heading = (
        "configuration", "seeds", first, second, "difference", "standard error", f"worst seed {first}", f"worst seed {second}",
    )  # fmt: skip
    return (
        f"{markdown_table([heading, *paired_rows(before, after)])}\n\n"
        "Mean Dice [%] over the seeds trained both ways; difference: mean of the seeds' differences."
    )


def paired_rows(first: Results, second: Results) -> list[list[str]]:
    """A line per configuration: mean Dice over the seeds that both files have, and the difference seed by seed."""
    dice = [
        {
            rows[0]["name"]: {row["seed"]: 100 * row["summary"]["mean"]["dice"]["mean"] for row in rows}
            for rows in of_configurations(results["rows"])
        }
        for results in (first, second)
    ]
    lines = []
    for name in (name for name in dice[0] if name in dice[1]):
        seeds = sorted(dice[0][name].keys() & dice[1][name].keys())
        one, other = (np.array([of_file[name][seed] for seed in seeds]) for of_file in dice)
        figures = (f"{value:.2f}" for value in (one.mean(), other.mean(), (other - one).mean()))
        error = f"{np.std(other - one, ddof=1) / np.sqrt(len(seeds)):.2f}" if len(seeds) > 1 else NO_FIGURE
        lines.append([name, str(len(seeds)), *figures, error, f"{one.min():.2f}", f"{other.min():.2f}"])
    return lines


def of_configurations(rows: Sequence[Row]) -> list[list[Row]]:
    """The runs of each name, which are to be seeds of one configuration; ValueError where rows say otherwise."""
    configurations = [of_name for _, of_name in groups(rows, key=lambda row: row["name"])]
    for first, *others in configurations:
        for key in SAME:
            if any(row[key] != first[key] for row in others):
                raise ValueError(f"runs of {first['name']} differ in {key}, accepted are seeds of one configuration")
        seeds = [row["seed"] for row in (first, *others)]
        if len(set(seeds)) < len(seeds):
            raise ValueError(f"runs of {first['name']} have the seeds {seeds}, accepted is each seed once")
    return configurations


def trained_on(results: Results) -> str:
    """The machines, with the commits of the trainings on each, and where the text embeddings were from."""
    commits: dict[str, dict[str, None]] = {}  # of a machine, in the order of the file
    for row in results["rows"]:
        where = row["environment"]
        machine = f"{where['gpu']['name'] if 'gpu' in where else where['cpu']}, {torch_version(row)}"
        commits.setdefault(machine, {})[where["commit"]] = None
    machines = "; ".join(f"{machine}, commit {', '.join(of_machine)}" for machine, of_machine in commits.items())
    texts = sorted({row["text"]["source"] for row in results["rows"] if "text" in row})
    return f"{machines}." + (f" Text embeddings: {', '.join(texts)}." if texts else "")
