"""The report of one run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from semiseg.atomic import write_text
from semiseg.config import Config
from semiseg.engine.run_directory import RunDirectory
from semiseg.evaluation.figures import learning_curves
from semiseg.evaluation.metrics import CaseMetrics
from semiseg.evaluation.pictures import SHOWN
from semiseg.evaluation.tables import empty_counts, metric_headings, scaled, summary_rows
from semiseg.preparation.volume import sides
from semiseg.reporting.page import Picture, render
from semiseg.reporting.results import load_results


@dataclass(frozen=True)
class Section:
    """Pictures under a heading, and what to say about missing ones."""

    heading: str
    pictures: Sequence[Picture]
    missing: str


def write_report(run: RunDirectory, config: Config, output: Path, reason: str = "") -> None:
    """Write a run's report from its results and the pictures there are.

    `reason` says why some are missing. FileNotFoundError or ValueError as `load_results`.
    """
    results = load_results(run)
    environment = run.read_environment()
    write_text(
        output,
        render(
            "run.html",
            title=results["name"],
            subtitle=f"Report of the run {run.path.resolve()}",
            warnings=_warnings(results, environment),
            facts=_facts(results, config, environment),
            checkpoints=[_checkpoint(results["checkpoint"], results, "reported")]
            + [
                _checkpoint(name, result, "for comparison")
                for name, result in results["other_checkpoints"].items()
            ],
            sections=_sections(run, reason),
            cases=_case_rows(results["cases"], results["summary"]["unit"]),
            configuration=run.config.read_text(),
        ),
    )


def _warnings(results: Mapping[str, Any], environment: Mapping[str, Any]) -> list[str]:
    summary = results["summary"]
    warnings = [f"Warning: {results['warning']}."] if "warning" in results else []
    for what in ("prediction", "truth"):
        if summary[f"empty_{what}"]:
            warnings.append(
                f"{summary[f'empty_{what}']} of {summary['num_cases'] * len(summary['classes'])} {what}s are empty: "
                "they hold no voxel of a class. They are part of the means."
            )
    if environment.get("commit", "").endswith("-dirty"):
        warnings.append("The code was changed after the commit named below.")
    return warnings


def _facts(
    results: Mapping[str, Any], config: Config, environment: Mapping[str, Any]
) -> list[tuple[str, str]]:
    evaluation = results["evaluation"]
    components = "largest component of each class" if evaluation["largest_component"] else "all components"
    window = (
        "slice by slice"
        if evaluation["stride"] is None
        else f"sliding window, stride {sides(evaluation['stride'])}"
    )
    facts = {
        "method": f"{results['method']}, {results['preset']} preset",
        "network": f"{config.network.name}, {', '.join(map(str, config.network.filters))} filters",
        "dataset": f"{results['dataset']}: {', '.join(results['classes'])}",
        "labelled": str(results["labelled"]),
        "seed": str(results["seed"]),
        "text": ", ".join(f"{key} {value}" for key, value in results.get("text", {}).items()),
        "checkpoint": f"{results['checkpoint']}, iteration {results['iteration']}",
        "prediction": f"{evaluation['head']} head, {window}, {components}",
    }
    for phase, cost in results.get("cost", {}).items():
        facts[f"cost, {phase}"] = (
            f"{cost['parameters'] / 1e6:.2f} million parameters, {cost['multiply_adds'] / 1e9:.2f} billion multiply-adds "
            f"a patch of {sides(config.training.patch_size)}"
        )
    # Without the first one where a run too old to know it was resumed.
    sessions = [session for session in (environment, *environment.get("resumed", [])) if "command" in session]
    for number, session in enumerate(sessions, start=1):
        suffix = "" if len(sessions) == 1 else f" {number}"
        facts |= {
            f"command{suffix}": session["command"],
            f"machine{suffix}": _machine(session),
            f"versions{suffix}": ", ".join(
                f"{name} {version}" for name, version in session["versions"].items()
            ),
            f"commit{suffix}": session["commit"],
        }
    return [(name, value) for name, value in facts.items() if value]


def _machine(session: Mapping[str, Any]) -> str:
    machine = f"{session['cpu']}, {session['cores']} cores"
    gpu = session.get("gpu")
    if gpu is None:
        return machine
    versions = ", ".join(f"{name} {version}" for name, version in gpu["versions"].items())
    return f"{machine}; {gpu['count']} × {gpu['name']}, {versions}"


def _checkpoint(name: str, result: Mapping[str, Any], role: str) -> dict[str, Any]:
    summary = result["summary"]
    return {
        "heading": f"Checkpoint {name}, iteration {result['iteration']}, {role}",
        "rows": summary_rows(summary),
        "note": f"{summary['num_cases']} test cases; {empty_counts(summary)}.",
    }


def _case_rows(cases: Mapping[str, CaseMetrics], unit: str) -> list[list[str]]:
    headings = metric_headings(unit)
    rows = [["case", "class", *headings.values(), "empty"]]
    for case, classes in cases.items():
        for name, values in classes.items():
            empty = [what for what in ("prediction", "truth") if values[f"empty_{what}"]]
            numbers = [f"{scaled(metric, values[metric]):.2f}" for metric in headings]
            rows.append([case, name, *numbers, ", ".join(empty)])
    return rows


def _sections(run: RunDirectory, reason: str) -> list[Section]:
    if not run.learning_curves.is_file() and run.metrics.is_file():
        learning_curves(run.metrics, run.learning_curves)
    return [
        _section(
            "Learning curves",
            {run.learning_curves: "Losses, also smoothed, and rates over the iterations."},
            f"{run.metrics.name} is missing",
        ),
        _section(
            "Predictions",
            _of_shown_cases(run.overlays, "truth (solid line) and prediction (filled, dashed line)."),
            reason,
        ),
        _section(
            "Surfaces",
            _of_shown_cases(
                run.surfaces,
                "surfaces of truth and prediction, smoothed, coloured by their distance from each other.",
            ),
            reason,
        ),
        _section(
            "Embeddings",
            {
                run.embedding_map: "Embeddings of voxels of these cases, as many of every class, coloured by their true "
                "class. What is near is similar; sizes and gaps of clusters mean little."
            },
            reason,
        ),
    ]


def _of_shown_cases(folder: Path, what: str) -> dict[Path, str]:
    return {folder / f"{shown}.png": f"The {shown} test case: {what}" for shown in SHOWN}


def _section(
    heading: str,
    texts: Mapping[Path, str],  # what each picture shows
    reason: str,  # why one may be missing
) -> Section:
    pictures = [Picture.of_png(path.read_bytes(), text) for path, text in texts.items() if path.is_file()]
    missing = f"Not all pictures could be drawn: {reason}." if len(pictures) < len(texts) else ""
    return Section(heading, pictures, missing)
