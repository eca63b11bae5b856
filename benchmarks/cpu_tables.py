"""Tables of operations on a CPU: the C++ kernels, the prompt convolution's two forms, the convolutions."""

from table_parts import Results, Row, machine, note, origin, times, titled_tables, versions

from semiseg.evaluation.tables import markdown_table

KERNEL_HEADING = (
    "operation", "C++", "eager", "compiled", "eager / C++", "compiled / C++", "C++ / traffic",
    "MB C++", "MB eager", "MB compiled",
)  # fmt: skip
STEP_HEADING = ("operation, step", "ms", "eager takes", "compiled takes", "MB", "MB eager", "MB compiled")
PROMPT_CONV_HEADING = (
    "voxels", "C", "part", "folded", "concatenated", "concatenated / folded", "MB folded", "MB concatenated",
)  # fmt: skip
CONVOLUTIONS_HEADING = (
    "operation", "channels", "voxels of x", "part", "own", "PyTorch", "PyTorch / own", "MB own", "MB PyTorch",
)  # fmt: skip


def kernel_table(results: Results) -> str:
    """Medians in ms, how many times slower the others are, and extra peak memory, per operation and size."""
    notes = (
        f"Median milliseconds of {results['rows'][0]['rounds']} rounds in which the contestants took turns; "
        "eager and compiled are the reference as it is and under torch.compile; a step is both passes. "
        "C++ / traffic: the time over that of the bytes no implementation can avoid to read (inputs, upstream "
        "gradients) and to write (results, gradient), at the pace of torch.sum and fill_ in the same rounds. Backward "
        "passes include the gradients of parameters. MB: extra peak memory, results and gradient included. "
        f"{origin(results, machine(results), versions(results['environment']['versions']))}"
    )
    return titled_tables(results["rows"], kernel_title, KERNEL_HEADING, kernel_cells, notes)


def kernel_title(row: Row) -> str:
    return (
        f"B = {row['batch']}, {times(row['spatial'])} voxels, d = {row['d']}, C = {row['num_classes']}, "
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
    where = results["environment"]
    notes = f"{where['cpu']}; commit {where['commit']}.{note(results)}"
    return titled_tables(rows, kernel_title, STEP_HEADING, step_cells, notes)


def step_cells(row: Row) -> list[str]:
    cpu, eager, compiled = (row["contestants"][name] for name in ("cpu", "eager", "compiled"))
    return [
        row["operation"],
        f"{cpu['median_ms']:.1f}",
        *(f"{contestant['over_cpu']:.1f}×" for contestant in (eager, compiled)),
        *(f"{contestant['extra_peak_mb']:.0f}" for contestant in (cpu, eager, compiled)),
    ]


def prompt_conv_table(results: Results) -> str:
    """Medians in ms and extra peak memory of the folded and the concatenated form, per size."""
    notes = forms_notes(results, "features, logits, text, weight and bias")
    return titled_tables(results["rows"], prompt_conv_title, PROMPT_CONV_HEADING, prompt_conv_cells, notes)


def prompt_conv_title(row: Row) -> str:
    channels = row["channels"]
    return (
        f"B = {row['batch']}, {channels} + {channels} → {channels} channels, {times(row['kernel'])}, float32; "
        f"allocator: {row['allocator']}"
    )


def prompt_conv_cells(row: Row) -> list[str]:
    size = times(row["spatial"])
    return [size, str(row["num_classes"]), row["part"], *form_cells(row, "folded", "concatenated")]


def convolutions_table(results: Results) -> str:
    """Medians in ms and extra peak memory of the own convolutions and PyTorch's, forward and a step, per size."""
    notes = forms_notes(results, "x, where it has more than one channel, and weight")
    return f"{markdown_table([CONVOLUTIONS_HEADING, *map(convolution_cells, results['rows'])])}\n\n{notes}"


def convolution_cells(row: Row) -> list[str]:
    channels, size = " → ".join(map(str, row["channels"])), f"{row['batch']} of {times(row['spatial'])}"
    return [row["operation"], channels, size, row["part"], *form_cells(row, "own", "PyTorch")]


def form_cells(row: Row, name: str, rival: str) -> list[str]:
    """Milliseconds of both, their ratio, megabytes of both."""
    forms = [row["contestants"][form] for form in (name, rival)]
    return [
        *(f"{form['median_ms']:.1f}" for form in forms),
        f"{forms[1]['median_ms'] / forms[0]['median_ms']:.2f}",
        *(f"{form['extra_peak_mb']:.1f}" for form in forms),
    ]


def forms_notes(results: Results, differentiated: str) -> str:
    return (
        f"Median milliseconds of {results['rows'][0]['rounds']} rounds in which the two forms took turns; a step is "
        f"both passes, with the gradients of {differentiated}. MB: extra peak memory, result and gradients included. "
        f"{origin(results, machine(results), versions(results['environment']['versions']))}"
    )
