"""Reading what an evaluation wrote."""

import json
from typing import Any

from semiseg.engine.run_directory import RunDirectory
from semiseg.evaluation.metrics import summarise

KEYS = ("name", "method", "preset", "dataset", "labelled", "seed", "classes", "evaluation", "checkpoint", "iteration",
        "other_checkpoints")  # fmt: skip
EVALUATION_KEYS = ("stride", "head", "largest_component")


def load_results(run: RunDirectory) -> dict[str, Any]:
    """The content of a run's results.json, its summaries computed anew from the cases.

    Raises FileNotFoundError where the run has not been evaluated, ValueError where the file is damaged.
    """
    remedy = f"evaluate the run with `{run.evaluate_command()}`"
    if not run.results.is_file():
        raise FileNotFoundError(f"{run.results} is missing: {remedy}")
    try:
        results = json.loads(run.results.read_text())
        for section, keys in ((results, KEYS), (results["evaluation"], EVALUATION_KEYS)):
            missing = [key for key in keys if key not in section]
            if missing:
                raise KeyError(missing[0])
        others = {name: _with_summary(result) for name, result in results["other_checkpoints"].items()}
        return {**_with_summary(results), "other_checkpoints": others}
    except KeyError as error:
        reason = f"{error} is missing"
    except (ValueError, TypeError, AttributeError) as error:
        reason = str(error)
    raise ValueError(f"{run.results} is damaged ({reason}): {remedy}")


def _with_summary(result: dict[str, Any]) -> dict[str, Any]:
    return {**result, "summary": summarise(result["cases"])}
