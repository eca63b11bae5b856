"""Tables of the Triton and CUDA kernels on a GPU."""

from table_parts import NO_FIGURE, Results, Row, groups, note, origin, times, titled_tables, versions

from semiseg.evaluation.tables import markdown_table

GPU_HEADING = (
    "operation", "auto", "floor", "Triton", "CUDA", "eager", "compiled", "tuned", "GEMM", "% of copy Triton",
    "% of copy CUDA", "eager / auto", "compiled / auto", "MB auto", "MB eager",
)  # fmt: skip


def gpu_table(results: Results) -> str:
    """Medians in us, shares of a copy's bandwidth, and how much the rivals need, per operation, size and dtype."""
    return titled_tables(results["rows"], gpu_title, GPU_HEADING, gpu_cells, gpu_notes(results))


def gpu_title(row: Row) -> str:
    return (
        f"{row['workload']}: B = {row['batch']}, {times(row['spatial'])} voxels, d = {row['d']}, "
        f"C = {row['num_classes']}, K = {row['per_class']}, {row['dtype']}"
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


def gpu_notes(results: Results) -> str:
    where, rows = results["environment"], results["rows"]
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
        f"{origin(results, where['gpu']['name'], versions(where['versions'] | where['gpu']['versions']))}"
    )


def gpu_summary_table(results: Results) -> str:
    """What is chosen when no backend is asked for, at the size of the first row, in every dtype."""
    first, where = results["rows"][0], results["environment"]
    rows = [row for row in results["rows"] if row["workload"] == first["workload"] and row["part"] != "step"]
    dtypes = list(dict.fromkeys(row["dtype"] for row in rows))
    figures = "µs", "of a copy", "eager takes"
    lines = [["", *(f"{dtype} {figure}" for dtype in dtypes for figure in figures)]]
    for name, members in groups(rows, key=lambda row: f"{row['operation']} {row['part']}"):
        of_dtype = {row["dtype"]: gpu_summary_cells(row) for row in members}
        lines.append([name, *(cell for dtype in dtypes for cell in of_dtype.get(dtype, [NO_FIGURE] * len(figures)))])
    return (
        f"{markdown_table(lines)}\n\nB = {first['batch']}, {times(first['spatial'])} voxels, d = {first['d']}, "
        f"C = {first['num_classes']}, K = {first['per_class']}; {where['gpu']['name']}; commit {where['commit']}."
        f"{note(results)}"
    )


def gpu_summary_cells(row: Row) -> list[str]:
    automatic, eager = row["contestants"].get(row["automatic"]), row["contestants"]["eager"]
    if automatic is None:
        return [NO_FIGURE] * 3
    ratio = eager["median_us"] / automatic["median_us"]
    return [f"{automatic['median_us']:.0f}", f"{100 * automatic['of_copy']:.0f} %", f"{ratio:.1f}×"]


def cuda_kernels_table(results: Results) -> str:
    """The CUDA kernels before and after a change, a line a part of an operation, a column pair a dtype."""
    moments, dtypes = ("before", "after"), list(dict.fromkeys(row["dtype"] for row in results["rows"]))
    lines = [["", *(f"{dtype} {moment} µs" for dtype in dtypes for moment in moments)]]
    for name, members in groups(
        results["rows"], key=lambda row: f"{row['workload']}: {row['operation']} {row['part']}"
    ):
        of_dtype = {row["dtype"]: row for row in members}
        figures = (of_dtype.get(dtype, {}).get(moment) for dtype in dtypes for moment in moments)
        cells = (f"{each['median_us']} ({100 * each['of_copy']:.0f} %)" if each else NO_FIGURE for each in figures)
        lines.append([name, *cells])
    return (
        f"{markdown_table(lines)}\n\nIn brackets the bandwidth beside a copy's. "
        f"{results['environment']['gpu']['name']}.{note(results)}"
    )
