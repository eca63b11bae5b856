"""Tables of whole networks: ladders, profiles of a training step, memory of a prediction, rounding of gradients."""

from table_parts import NO_FIGURE, Results, machine, origin, times, torch_version

from semiseg.evaluation.tables import markdown_table

LADDER_HEADING = ("", "seconds", "own gain", "over plain with kept heap", "over plain", "peak GB")


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
    notes = (
        f"Own gain: over the line above.{_spread(results)} "
        f"{origin(results, machine(results), torch_version(results))}"
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


def training_profile_table(results: Results) -> str:
    """A line a way of training: how quick, and the shares of the operations that any line spends a hundredth on."""
    rows, where = results["rows"], results["environment"]
    largest: dict[str, float] = {}
    for row in rows:
        for group, share in row["shares"].items():
            largest[group] = max(share, largest.get(group, 0))
    shown = [group for group in sorted(largest, key=largest.__getitem__, reverse=True) if largest[group] >= 0.01]
    lines = [
        [
            row["workload"],
            row["precision"] + (", CUDA graph" if row["cuda_graph"] else ""),
            f"{row['steps_per_second']:.3g}",
            *(f"{100 * row['shares'].get(group, 0):.1f} %" if row["shares"] else NO_FIGURE for group in shown),
        ]
        for row in rows
    ]
    device = where["gpu"]["name"] if "gpu" in where else f"{where['cpu']}, {where['threads']} threads"
    return (
        f"{markdown_table([('', '', 'steps / s', *shown), *lines])}\n\n"
        f"{origin(results, device, torch_version(results))}"
    )


def prediction_memory_table(results: Results) -> str:
    """A line a network and a scan."""
    heading = ("network", "scan [voxel]", "peak memory of the process [GB]")
    rows = [[row["configuration"], times(row["shape"]), f"{row['peak_gb']:.2f}"] for row in results["rows"]]
    return f"{markdown_table([heading, *rows])}\n\n{origin(results, results['environment']['cpu'])}"


def gradient_rounding_table(results: Results) -> str:
    """A line a rounding, a column a moment of the training."""
    rows = results["rows"]
    processor = f"{results['environment']['cpu']}, {torch_version(results)}"
    heading = ("rounding", *(f"after {row['step']} steps" for row in rows))
    lines = [
        [name, *(f"{100 * row['differences'][name]:.1f} %" for row in rows)] for name in rows[0]["differences"]
    ]
    return (
        f"{markdown_table([heading, *lines])}\n\n{results['configuration']}, {results['batches']} batches; "
        f"{origin(results, processor)}"
    )
