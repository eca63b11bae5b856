"""`python -m semiseg.report RUN [RUN ...]`: the report of a run, or several runs against each other, in one HTML file."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from semiseg.commands import command
from semiseg.destinations import check_destination
from semiseg.engine.run_directory import RunDirectory
from semiseg.engine.trainer import open_configured_dataset
from semiseg.evaluation.evaluator import predict_case
from semiseg.evaluation.pictures import draw_pictures, prediction_pictures
from semiseg.models.folding import fold_batch_norm
from semiseg.prediction import Predictor
from semiseg.reporting.comparison import EvaluatedRun
from semiseg.reporting.comparison_report import write_comparison
from semiseg.reporting.results import load_results
from semiseg.reporting.run_report import write_report

COMPARISON = "comparison.html"


@command
def main(arguments: list[str] | None = None) -> None:
    """Write the report of one run, or compare several, on the console too."""
    parser = argparse.ArgumentParser("python -m semiseg.report", description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run directory with results")
    parser.add_argument(
        "--output", type=Path, metavar="FILE.html", help=f"default RUN/report.html, of several {COMPARISON}"
    )
    options = parser.parse_args(arguments)
    output = options.output
    if output is not None and (output.suffix != ".html" or output.is_dir() or not output.parent.is_dir()):
        raise ValueError(f"--output is {output}, accepted is a file that ends in .html, in a folder that exists")
    if len(options.runs) == 1:
        run, config = RunDirectory.open(options.runs[0])
        output = output or run.report
        check_destination(output)  # pictures may take minutes
        reason = complete_pictures(run)
        if reason:
            print(f"the pictures that need predictions could not be drawn: {reason}")
        write_report(run, config, output, reason)
    else:
        output = output or Path(COMPARISON)
        print(write_comparison([EvaluatedRun.open(path) for path in options.runs], output))
    print(f"written to {output}")


def complete_pictures(run: RunDirectory) -> str:
    """Draw the pictures that need predictions if one is missing, or say why not.

    Raises FileNotFoundError or ValueError as `load_results`.
    """
    results = load_results(run)
    if all(path.is_file() for path in prediction_pictures(run)):
        return ""
    try:
        evaluation = {**results["evaluation"], "select": results["checkpoint"]}
        predictor = Predictor(
            run.path, [f"evaluation.{key}={json.dumps(value)}" for key, value in evaluation.items()]
        )
        config, method, device = predictor.config, predictor.method, predictor.device
        dataset = open_configured_dataset(config)
        run.check_dataset(dataset)
        folded = fold_batch_norm(method)  # as in the evaluation, whose figures are shown
        draw_pictures(
            run,
            config,
            method,
            dataset,
            device,
            results["cases"],
            lambda case: predict_case(folded, case.image, config, device),
        )
    except (ValueError, OSError) as error:
        return str(error)
    return ""


if __name__ == "__main__":
    main()
