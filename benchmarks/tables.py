"""Regenerate the tables of README.md and docs/ from benchmarks/results: python benchmarks/tables.py

A table stands between <!-- table:NAME --> and <!-- /table -->. TABLES says how each name is made from its
results, the JSON in benchmarks/results/NAME.json or, where a table shows a part of them or two together, in the files that
SOURCES names.
"""

import json
import re
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from training_table import (
    evaluation_cells,
    evaluation_header,
    paired_rows,
    training_header,
    training_notes,
    training_rows,
)

from semiseg.evaluation.tables import markdown_table

ROOT = Path(__file__).parent.parent
DOCUMENTS = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
RESULTS = ROOT / "benchmarks" / "results"
MARKED = re.compile(r"(<!-- table:([\w-]+) -->\n).*?(<!-- /table -->)", re.DOTALL)

Results = dict[str, Any]
Row = dict[str, Any]
Key = TypeVar("Key")


def kernel_table(results: Results) -> str:
    """Medians in ms, how many times slower the others are, and extra peak memory, per operation and size."""
    tables = [
        f"{title}\n\n{markdown_table([KERNEL_HEADING, *map(kernel_cells, rows)])}"
        for title, rows in groups(results["rows"], key=kernel_title)
    ]
    return "\n\n".join([*tables, kernel_notes(results)])


KERNEL_HEADING = (
    "operation", "C++", "eager", "compiled", "eager / C++", "compiled / C++", "C++ / traffic",
    "MB C++", "MB eager", "MB compiled",
)  # fmt: skip


def kernel_title(row: Row) -> str:
    size = "×".join(map(str, row["spatial"]))
    return (
        f"B = {row['batch']}, {size} voxels, d = {row['d']}, C = {row['num_classes']}, "
        f"K = {row['per_class']}, float32; allocator: {row['allocator']}"
    )


def kernel_cells(row: Row) -> list[str]:
    cpu, eager, compiled = (row["contestants"][name] for name in ("cpu", "eager", "compiled"))
    return [
        f"{row['operation']} {row['part']}",
        *(f"{contestant['median_ms']:.1f}" for contestant in (cpu, eager, compiled)),
        *(f"{contestant['over_cpu']:.1f}" for contestant in (eager, compiled)),
        f"{cpu['over_compulsory']:.1f}",
        *(f"{contestant['extra_peak_mb']:.0f}" for contestant in (cpu, eager, compiled)),
    ]


def step_table(results: Results) -> str:
    """Forward and backward together: how many times slower the others are, and extra peak memory."""
    rows = [row for row in results["rows"] if row["part"] == "step"]
    tables = [
        f"{title}\n\n{markdown_table([STEP_HEADING, *map(step_cells, members)])}"
        for title, members in groups(rows, key=kernel_title)
    ]
    where = results["environment"]
    return "\n\n".join([*tables, f"{where['cpu']}; commit {where['commit']}.{note(results)}"])


STEP_HEADING = ("operation, step", "ms", "eager takes", "compiled takes", "MB", "MB eager", "MB compiled")


def step_cells(row: Row) -> list[str]:
    cpu, eager, compiled = (row["contestants"][name] for name in ("cpu", "eager", "compiled"))
    return [
        row["operation"],
        f"{cpu['median_ms']:.1f}",
        *(f"{contestant['over_cpu']:.1f}×" for contestant in (eager, compiled)),
        *(f"{contestant['extra_peak_mb']:.0f}" for contestant in (cpu, eager, compiled)),
    ]


def kernel_notes(results: Results) -> str:
    where = results["environment"]
    versions = ", ".join(f"{name} {version}" for name, version in where["versions"].items())
    return (
        f"Median milliseconds of {results['rows'][0]['rounds']} rounds in which the contestants took turns; "
        "eager and compiled are the reference as it is and under torch.compile; a step is both passes. "
        "C++ / traffic: the time over that of the bytes no implementation can avoid to read (inputs, upstream "
        "gradients) and to write (results, gradient), at the pace of torch.sum and fill_ in the same rounds. Backward "
        "passes include the gradients of parameters. MB: extra peak memory, results and gradient included. "
        f"{where['cpu']}, {where['cores']} cores, {where['threads']} threads; {versions}; "
        f"commit {where['commit']}; `{results['command']}`.{note(results)}"
    )


def gpu_table(results: Results) -> str:
    """Medians in us, shares of a copy's bandwidth, and how much the rivals need, per operation, size and dtype."""
    tables = [
        f"{title}\n\n{markdown_table([GPU_HEADING, *map(gpu_cells, rows)])}"
        for title, rows in groups(results["rows"], key=gpu_title)
    ]
    return "\n\n".join([*tables, gpu_notes(results)])


def gpu_summary_table(results: Results) -> str:
    """What is chosen when no backend is asked for, at the size of the first row, in every dtype."""
    first = results["rows"][0]
    rows = [row for row in results["rows"] if row["workload"] == first["workload"] and row["part"] != "step"]
    dtypes = list(dict.fromkeys(row["dtype"] for row in rows))
    heading = (
        "",
        *(f"{dtype} {figure}" for dtype in dtypes for figure in ("µs", "of a copy", "eager takes")),
    )
    lines = []
    for name, members in groups(rows, key=lambda row: f"{row['operation']} {row['part']}"):
        of_dtype = {row["dtype"]: gpu_summary_cells(row) for row in members}
        lines.append([name, *(cell for dtype in dtypes for cell in of_dtype.get(dtype, [NO_FIGURE] * 3))])
    size, where = "×".join(map(str, first["spatial"])), results["environment"]
    return (
        f"{markdown_table([heading, *lines])}\n\nB = {first['batch']}, {size} voxels, d = {first['d']}, "
        f"C = {first['num_classes']}, K = {first['per_class']}; {where['gpu']['name']}; commit {where['commit']}."
        f"{note(results)}"
    )


def gpu_summary_cells(row: Row) -> list[str]:
    automatic, eager = row["contestants"].get(row["automatic"]), row["contestants"]["eager"]
    if automatic is None:
        return [NO_FIGURE] * 3
    ratio = eager["median_us"] / automatic["median_us"]
    return [f"{automatic['median_us']:.0f}", f"{100 * automatic['of_copy']:.0f} %", f"{ratio:.1f}×"]


GPU_HEADING = (
    "operation", "auto", "floor", "Triton", "CUDA", "eager", "compiled", "tuned", "GEMM", "% of copy Triton",
    "% of copy CUDA", "eager / auto", "compiled / auto", "MB auto", "MB eager",
)  # fmt: skip
NO_FIGURE = "–"


def gpu_title(row: Row) -> str:
    size = "×".join(map(str, row["spatial"]))
    return (
        f"{row['workload']}: B = {row['batch']}, {size} voxels, d = {row['d']}, C = {row['num_classes']}, "
        f"K = {row['per_class']}, {row['dtype']}"
    )


def gpu_cells(row: Row) -> list[str]:
    def cell(contestant: str, figure: str, text: str = "{:.0f}", factor: float = 1) -> str:
        figures = row["contestants"].get(contestant)
        return NO_FIGURE if figures is None else text.format(factor * figures[figure])

    automatic = row["contestants"].get(row["automatic"])
    per_automatic = 1 / automatic["median_us"] if automatic else 0
    slower = (
        cell(rival, "median_us", "{:.1f}", per_automatic) if automatic else NO_FIGURE
        for rival in ("eager", "compiled")
    )  # fmt: skip
    names = ("triton", "cuda", "eager", "compiled", "max-autotune", "gemm")
    return [
        f"{row['operation']} {row['part']}",
        row["automatic"],
        f"{row['compulsory_bytes'] / row['copy_gb_s'] / 1e3:.0f}",
        *(cell(name, "median_us") for name in names),
        *(cell(name, "of_copy", "{:.0f}", 100) for name in ("triton", "cuda")),
        *slower,
        *(cell(name, "extra_peak_mb") for name in (row["automatic"], "eager")),
    ]


def cuda_kernels_table(results: Results) -> str:
    """The CUDA kernels before and after a change, a line a part of an operation, a column pair a dtype."""
    moments, dtypes = ("before", "after"), list(dict.fromkeys(row["dtype"] for row in results["rows"]))
    heading = ("", *(f"{dtype} {moment} µs" for dtype in dtypes for moment in moments))
    lines = []
    for name, members in groups(
        results["rows"], key=lambda row: f"{row['workload']}: {row['operation']} {row['part']}"
    ):
        of_dtype = {row["dtype"]: row for row in members}
        figures = (of_dtype.get(dtype, {}).get(moment) for dtype in dtypes for moment in moments)
        lines.append([
            name,
            *(f"{x['median_us']} ({100 * x['of_copy']:.0f} %)" if x else NO_FIGURE for x in figures),
        ])  # fmt: skip
    return (
        f"{markdown_table([heading, *lines])}\n\nIn brackets the bandwidth beside a copy's. "
        f"{results['environment']['gpu']['name']}.{note(results)}"
    )


def gpu_notes(results: Results) -> str:
    where = results["environment"]
    versions = ", ".join(
        f"{name} {version}" for name, version in (where["versions"] | where["gpu"]["versions"]).items()
    )
    rows = results["rows"]
    copies = [row["copy_gb_s"] for row in rows]
    reasons = dict.fromkeys(
        f"{contestant}: {reason}" for row in rows for contestant, reason in row["left_out"].items()
    )
    return (
        f"Median microseconds of {rows[0]['rounds']} rounds in which the contestants took turns, between two events on "
        "the GPU, the L2 cache flushed before each; a step is both passes. auto: the backend that is chosen when none is "
        "asked for. floor: the time in which a copy moves the bytes no implementation can avoid (inputs, results, "
        f"upstream gradients, gradient); copies of the input in the same rounds: {min(copies):.0f} to "
        f"{max(copies):.0f} GB/s. eager, compiled and tuned: the reference as it is, under torch.compile, and under its "
        "max-autotune; GEMM: the embeddings normalised once, one matrix product, reductions. MB: extra peak memory, "
        f"results and gradient included. {NO_FIGURE}: left out ({'; '.join(reasons)}). "
        f"{where['gpu']['name']}; {versions}; commit {where['commit']}; `{results['command']}`.{note(results)}"
    )


def note(results: Results) -> str:
    """What is to be known of a measurement beside where and how it was made."""
    return f" {results['note']}" if "note" in results else ""


def prompt_conv_table(results: Results) -> str:
    """Medians in ms and extra peak memory of the folded and the concatenated form, per size."""
    tables = [
        f"{title}\n\n{markdown_table([PROMPT_CONV_HEADING, *map(prompt_conv_cells, rows)])}"
        for title, rows in groups(results["rows"], key=prompt_conv_title)
    ]
    return "\n\n".join([*tables, prompt_conv_notes(results)])


PROMPT_CONV_HEADING = (
    "voxels", "C", "part", "folded", "concatenated", "concatenated / folded", "MB folded", "MB concatenated",
)  # fmt: skip


def prompt_conv_title(row: Row) -> str:
    kernel, channels = "×".join(map(str, row["kernel"])), row["channels"]
    return (
        f"B = {row['batch']}, {channels} + {channels} → {channels} channels, {kernel}, float32; "
        f"allocator: {row['allocator']}"
    )


def prompt_conv_cells(row: Row) -> list[str]:
    return [
        "×".join(map(str, row["spatial"])),
        str(row["num_classes"]),
        row["part"],
        *form_cells(row, "folded", "concatenated"),
    ]


def prompt_conv_notes(results: Results) -> str:
    return forms_notes(results, "features, logits, text, weight and bias")


def forms_notes(results: Results, differentiated: str) -> str:
    where = results["environment"]
    versions = ", ".join(f"{name} {version}" for name, version in where["versions"].items())
    return (
        f"Median milliseconds of {results['rows'][0]['rounds']} rounds in which the two forms took turns; a step is "
        f"both passes, with the gradients of {differentiated}. MB: extra peak memory, result "
        f"and gradients included. {where['cpu']}, {where['cores']} cores, {where['threads']} threads; {versions}; "
        f"commit {where['commit']}; `{results['command']}`."
    )


def convolutions_table(results: Results) -> str:
    """Medians in ms and extra peak memory of the own convolutions and PyTorch's, forward and a step, per size."""
    lines = [
        [
            row["operation"],
            " → ".join(map(str, row["channels"])),
            f"{row['batch']} of " + "×".join(map(str, row["spatial"])),
            row["part"],
            *form_cells(row, "own", "PyTorch"),
        ]
        for row in results["rows"]
    ]
    notes = forms_notes(results, "x, where it has more than one channel, and weight")
    return f"{markdown_table([CONVOLUTIONS_HEADING, *lines])}\n\n{notes}"


CONVOLUTIONS_HEADING = (
    "operation", "channels", "voxels of x", "part", "own", "PyTorch", "PyTorch / own", "MB own", "MB PyTorch",
)  # fmt: skip


def form_cells(row: Row, name: str, rival: str) -> list[str]:
    """Milliseconds of both, their ratio, megabytes of both."""
    forms = [row["contestants"][form] for form in (name, rival)]
    return [
        *(f"{form['median_ms']:.1f}" for form in forms),
        f"{forms[1]['median_ms'] / forms[0]['median_ms']:.2f}",
        *(f"{form['extra_peak_mb']:.1f}" for form in forms),
    ]


def prediction_memory_table(results: Results) -> str:
    rows = [
        [row["configuration"], "×".join(map(str, row["shape"])), f"{row['peak_gb']:.2f}"]
        for row in results["rows"]
    ]
    where = results["environment"]
    table = markdown_table([("network", "scan [voxel]", "peak memory of the process [GB]"), *rows])
    return f"{table}\n\n{where['cpu']}; commit {where['commit']}; `{results['command']}`."


def ladder_table(results: Results) -> str:
    """Per workload a line a rung: seconds, the gain of its lever, that of all so far, and peak memory."""
    tables = []
    for row in results["rows"]:
        stock, kept = (row["rungs"][levers]["seconds"] for levers in (0, 1))
        lines, before = [], stock
        for rung in row["rungs"]:
            seconds = rung["seconds"]
            gains = (before / seconds, kept / seconds, stock / seconds)
            lines.append([
                f"+ {rung['levers'][-1]}" if rung["levers"] else "plain",
                f"{seconds:.2f}",
                *(f"{gain:.2f}" for gain in gains),
                f"{rung['peak_gb']:.1f}",
            ])  # fmt: skip
            before = seconds
        tables.append(f"{row['workload']}\n\n{markdown_table([LADDER_HEADING, *lines])}")
    where = results["environment"]
    notes = (
        f"Own gain: over the line above.{_spread(results)} {where['cpu']}, {where['cores']} cores, "
        f"{where['threads']} threads; torch {where['versions']['torch']}; commit {where['commit']}; `{results['command']}`.{note(results)}"
    )
    return "\n\n".join([*tables, notes])


def _spread(results: Results) -> str:
    """Which workloads were measured in several rounds, and how far those of a rung lie apart."""
    told = ""
    for row in results["rows"]:
        rounds = [rung.get("seconds_of_rounds", [rung["seconds"]]) for rung in row["rungs"]]
        if len(rounds[0]) > 1:
            widest = max(max(seconds) / min(seconds) for seconds in rounds)
            told += (
                f" {row['workload']}: medians of {len(rounds[0])} rounds in which the lines took turns, the widest "
                f"range {widest:.2f}-fold."
            )
    return told


LADDER_HEADING = ("", "seconds", "own gain", "over plain with kept heap", "over plain", "peak GB")


def training_profile_table(results: Results) -> str:
    """A line a way of training: how quick, and the shares of the operations that any line spends a hundredth on."""
    rows = results["rows"]
    largest: dict[str, float] = {}
    for row in rows:
        for group, share in row["shares"].items():
            largest[group] = max(share, largest.get(group, 0))
    groups_shown = [
        group for group, share in sorted(largest.items(), key=lambda item: -item[1]) if share >= 0.01
    ]
    lines = [
        [
            row["workload"],
            row["precision"] + (", CUDA graph" if row["cuda_graph"] else ""),
            f"{row['steps_per_second']:.3g}",
            *(
                f"{100 * row['shares'].get(group, 0):.1f} %" if row["shares"] else NO_FIGURE
                for group in groups_shown
            ),
        ]
        for row in rows
    ]
    where = results["environment"]
    device = where["gpu"]["name"] if "gpu" in where else f"{where['cpu']}, {where['threads']} threads"
    return (
        f"{markdown_table([('', '', 'steps / s', *groups_shown), *lines])}\n\n{device}; "
        f"torch {where['versions']['torch']}; commit {where['commit']}; `{results['command']}`.{note(results)}"
    )


def gradient_rounding_table(results: Results) -> str:
    """A line a rounding, a column a moment of the training."""
    steps = [f"after {row['step']} steps" for row in results["rows"]]
    lines = [
        [name, *(f"{100 * row['differences'][name]:.1f} %" for row in results["rows"])]
        for name in results["rows"][0]["differences"]
    ]
    where = results["environment"]
    return (
        f"{markdown_table([('rounding', *steps), *lines])}\n\n{results['configuration']}, {results['batches']} batches; "
        f"{where['cpu']}, torch {where['versions']['torch']}; commit {where['commit']}; `{results['command']}`."
    )


def training_table(results: Results) -> str:
    rows = [training_header(), *training_rows(results)]
    return f"{markdown_table(rows)}\n\n{training_notes(results, training_header())}"


def evaluations_table(results: Results) -> str:
    """A line a way to evaluate a trained network."""
    rows = [evaluation_header(), *map(evaluation_cells, results["rows"])]
    notes = training_notes(results, evaluation_header())
    return f"{markdown_table(rows)}\n\n{notes}{note(results)}"


def groups(rows: list[Row], key: Callable[[Row], Key]) -> Iterable[tuple[Key, list[Row]]]:
    """Rows that share a key, wherever they stand, in the order in which each key first appears."""
    grouped: dict[Key, list[Row]] = {}
    for row in rows:
        grouped.setdefault(key(row), []).append(row)
    return grouped.items()


def paired_table(before: Results, after: Results, names: tuple[str, str]) -> str:
    """What training in another way changes, seed by seed; `names` are those of the two ways."""
    first, second = names
    heading = (
        "configuration", "seeds", first, second, "difference", "standard error", f"worst seed {first}", f"worst seed {second}",
    )  # fmt: skip
    return f"{markdown_table([heading, *paired_rows(before, after)])}\n\n{PAIRED_NOTES}"


PAIRED_NOTES = "Mean Dice [%] over the seeds trained both ways; difference: mean of the seeds' differences."


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
    "phantom": training_table,
    "phantom-plain": training_table,
    "phantom-bfloat16": training_table,
    "phantom-precision": partial(paired_table, names=("float32", "bfloat16")),
    "phantom-paths": partial(paired_table, names=("plain", "kernels")),
    "la": training_table,
    "la-gpu": evaluations_table,
    "la-prototypes": evaluations_table,
    "acdc": training_table,
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
