"""Regenerate the tables of README.md and docs/ from benchmarks/results: python benchmarks/tables.py

A table stands between <!-- table:NAME --> and <!-- /table -->. TABLES says how each name is made from its
results, the JSON in benchmarks/results/NAME.json or, where a table shows a part of them or two together, in the files that
SOURCES names.
"""

import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

from cpu_tables import convolutions_table, kernel_table, prompt_conv_table, step_table
from gpu_tables import cuda_kernels_table, gpu_summary_table, gpu_table
from network_tables import (
    gradient_rounding_table,
    ladder_table,
    prediction_memory_table,
    training_profile_table,
)
from table_parts import Results
from training_tables import evaluations_table, paired_table, training_table

ROOT = Path(__file__).parent.parent
DOCUMENTS = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
RESULTS = ROOT / "benchmarks" / "results"
MARKED = re.compile(r"(<!-- table:([\w-]+) -->\n).*?(<!-- /table -->)", re.DOTALL)

beside_others = partial(training_table, circumstances=", on a machine that ran other work beside it")

TABLES: dict[str, Callable[..., str]] = {
    "cpu-kernels": kernel_table,
    "cpu-kernels-steps": step_table,
    "cpu-kernels-default-allocator": kernel_table,
    "gpu-kernels": gpu_table,
    "gpu-kernels-summary": gpu_summary_table,
    "gpu-kernels-cuda": cuda_kernels_table,
    "prompt-conv": prompt_conv_table,
    "convolutions": convolutions_table,
    "convolutions-avx512": convolutions_table,
    "prediction-memory": prediction_memory_table,
    "training-ladder": ladder_table,
    "evaluation-ladder": ladder_table,
    "training-ladder-amx": ladder_table,
    "training-ladder-avx2": ladder_table,
    "training-ladder-acdc": ladder_table,
    "training-ladder-acdc-avx2": ladder_table,
    "training-ladder-acdc-avx512": ladder_table,
    "evaluation-ladder-amx": ladder_table,
    "evaluation-ladder-avx2": ladder_table,
    "gradient-rounding": gradient_rounding_table,
    "training-profile": training_profile_table,
    "training-profile-avx512": training_profile_table,
    "training-profile-gpu": training_profile_table,
    "phantom": beside_others,
    "phantom-plain": beside_others,
    "phantom-bfloat16": beside_others,
    "phantom-precision": partial(paired_table, names=("float32", "bfloat16")),
    "phantom-paths": partial(paired_table, names=("plain", "kernels")),
    "la": beside_others,
    "la-gpu": evaluations_table,
    "la-prototypes": evaluations_table,
    "acdc": beside_others,
    "acdc-mper": evaluations_table,
}
SOURCES = {
    "cpu-kernels-steps": ("cpu-kernels",),
    "gpu-kernels-summary": ("gpu-kernels",),
    "phantom-precision": ("phantom", "phantom-bfloat16"),
    "phantom-paths": ("phantom-plain", "phantom"),
}


def read_results(folder: Path = RESULTS) -> dict[str, Results]:
    return {file.stem: json.loads(file.read_text()) for file in sorted(folder.glob("*.json"))}


def fill(text: str, results: dict[str, Results]) -> str:
    """The text with every marked table made anew; a table whose results are not there yet is empty."""

    def replace(match: re.Match[str]) -> str:
        start, name, end = match.groups()
        if name not in TABLES:
            raise ValueError(f"the text marks the table {name!r}, accepted are {', '.join(TABLES)}")
        sources = SOURCES.get(name, (name,))
        if not all(source in results for source in sources):
            return f"{start}{end}"
        return f"{start}{TABLES[name](*(results[source] for source in sources))}\n{end}"

    return MARKED.sub(replace, text)


if __name__ == "__main__":
    for document in DOCUMENTS:
        document.write_text(fill(document.read_text(), read_results()))
