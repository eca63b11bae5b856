"""Draw the GPU benchmark against the limits of its GPU: python benchmarks/roofline.py [RESULTS [PICTURE]].

A picture per dtype: arithmetic intensity is the dot products' operations over the bytes that no implementation can avoid.
The roofs were measured in the same run: a copy's bandwidth, and a large matrix product in the dtype.
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from table_parts import Row, groups
from tables import RESULTS

from semiseg.atomic import replace_atomically

COLOURS = {  # Okabe and Ito's, told apart by the colour-blind
    "triton": "#0072B2",
    "cuda": "#D55E00",
    "eager": "#000000",
    "compiled": "#009E73",
    "max-autotune": "#56B4E9",
    "gemm": "#CC79A7",
}
MARKERS = {
    "prototype_similarity": "o",
    "prototype_info_nce": "s",
    "prototype_head": "D",
    "cluster_mean": "^",
    "prompt_mix": "v",
    "masked_class_mean": "X",
    "linear_classifier": "P",
}


def operations(row: Row) -> int | None:
    """Floating-point operations of the dot products in a part; None where an operation has no dot products."""
    voxels, d = row["batch"] * int(np.prod(row["spatial"])), row["d"]
    scores = 2 * d * row["num_classes"] * row["per_class"]  # a voxel with all prototypes
    classes = 2 * d * row["num_classes"]  # a voxel with one vector of every class
    sums = 2 * d  # a voxel added to its cluster
    passes = {
        "prototype_similarity": (scores, 2 * classes),  # projection off z, and the sum of the nearest prototypes
        "prototype_info_nce": (scores, 2 * scores),  # the scores again, and their weighted sum of prototypes
        "prototype_head": (scores + sums, 2 * scores),
        "cluster_mean": (scores // row["num_classes"] + sums, 0),
        "prompt_mix": (classes, 2 * classes),  # for logits and for text
        "masked_class_mean": (classes, classes),  # for z alone
        "linear_classifier": (classes, 2 * classes),  # for z and for the weights
    }.get(row["operation"])
    if passes is None:
        return None
    forward, backward = passes
    return voxels * {"forward": forward, "backward": backward, "step": forward + backward}[row["part"]]


def roofline(results: dict[str, Any], picture: Path) -> None:
    """Steps of every operation (forward of the cluster mean) at every size; a panel per dtype."""
    panels = groups([row for row in results["rows"] if is_drawn(row)], key=lambda row: row["dtype"])
    figure = Figure(figsize=(6.5 * len(panels), 5), layout="constrained")
    for axes, (dtype, rows) in zip(np.ravel(figure.subplots(1, len(panels), sharey=True)), panels, strict=True):
        draw(axes, rows, f"{results['environment']['gpu']['name']}, {dtype}")
    figure.legend(handles=legend(results["rows"]), loc="outside lower center", ncols=5, frameon=False)
    with replace_atomically(picture) as temporary:
        figure.savefig(temporary, dpi=150)


def is_drawn(row: Row) -> bool:
    return operations(row) is not None and (row["part"] == "step" or row["operation"] == "cluster_mean")


def draw(axes: Axes, rows: list[Row], name: str) -> None:
    bandwidth = max(row["copy_gb_s"] for row in rows) / 1e3  # TB/s
    peak = max(row["matmul_tflops"] for row in rows)
    intensities = [operations(row) / row["compulsory_bytes"] for row in rows]
    x = np.geomspace(min(intensities) / 2, max(*intensities, peak / bandwidth) * 2, 200)
    axes.plot(x, np.minimum(bandwidth * x, peak), color="#777777", linewidth=1.5)
    axes.set_title(f"{name}: copy {bandwidth:.2f} TB/s, matrix product {peak:.0f} TFLOP/s")
    for row, intensity in zip(rows, intensities, strict=True):
        measured = {name: figures for name, figures in row["contestants"].items() if figures}
        for contestant, figures in measured.items():
            achieved = operations(row) / figures["median_us"] / 1e6
            axes.plot(intensity, achieved, linestyle="", marker=MARKERS[row["operation"]], markersize=7,
                      color=COLOURS[contestant], markeredgecolor="white", markeredgewidth=0.5)  # fmt: skip
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("operations per compulsory byte")
    axes.set_ylabel("TFLOP/s of the dot products")
    axes.grid(which="major", color="#DDDDDD", linewidth=0.5)


def legend(rows: list[Row]) -> list[Line2D]:
    contestants = [name for name in COLOURS if any(row["contestants"].get(name) for row in rows)]
    drawn = [name for name in MARKERS if any(row["operation"] == name for row in rows)]
    marks = [
        *(("o", COLOURS[name], name) for name in contestants),
        *((MARKERS[name], "#777777", name) for name in drawn),
    ]
    return [Line2D([], [], linestyle="", marker=marker, color=colour, label=name) for marker, colour, name in marks]


if __name__ == "__main__":
    source = Path(sys.argv[1]) if len(sys.argv) > 1 else RESULTS / "gpu-kernels.json"
    roofline(
        json.loads(source.read_text()), Path(sys.argv[2]) if len(sys.argv) > 2 else source.with_suffix(".png")
    )
