"""Sums over all programs' partial sums, in a fixed order and in float64, and means of such sums."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from semiseg_kernels.triton.configurations import rows_per_program
from semiseg_kernels.triton.launch import launch

COLUMNS = 32


@triton.jit(do_not_specialize=["rows", "columns", "rows_per_program"])
def _add_partials(
    partials,  # [rows, columns]
    sums,  # [programs, columns] float64
    rows,
    columns,
    rows_per_program,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    begin = tl.cast(tl.program_id(1), tl.int64) * rows_per_program
    end = tl.minimum(begin + rows_per_program, rows)
    total = tl.zeros([ROWS, COLUMNS], tl.float64)
    for row in range(begin, end, ROWS):
        at = row + tl.arange(0, ROWS)[:, None]
        part = tl.load(partials + at * columns + column, mask=(at < end) & (column < columns), other=0)
        total += part.to(tl.float64)
    target = sums + tl.cast(tl.program_id(1), tl.int64) * columns + column
    tl.store(target, tl.sum(total, axis=0, keep_dims=True), mask=column < columns)


def add_partials(
    partials: Tensor,  # [rows, columns]
) -> Tensor:  # [columns] float64
    """The sum of the rows: of every few hundred of them, then of those sums."""
    rows_of_program = rows_per_program(len(partials))
    while True:
        rows, columns = partials.shape
        programs = triton.cdiv(rows, rows_of_program)
        sums = torch.empty(programs, columns, dtype=torch.float64, device=partials.device)
        launch(
            _add_partials, (triton.cdiv(columns, COLUMNS), programs), partials, num_warps=4,
            partials=partials, sums=sums, rows=rows, columns=columns, rows_per_program=rows_of_program,
            ROWS=32, COLUMNS=COLUMNS,
        )  # fmt: skip
        if programs == 1:
            return sums[0]
        # The second pass takes however many rows the first has left.
        partials, rows_of_program = sums, programs


@triton.jit
def _mean(
    sums,  # [2] float64: weight and weighted total
    mean,  # [] float32
):
    weight = tl.load(sums)
    quotient = tl.load(sums + 1) / tl.where(weight == 0, 1.0, weight)
    tl.store(mean, tl.where(weight == 0, 0.0, quotient).to(tl.float32))


def weighted_mean(
    sums: Tensor,  # [2] float64: weight and weighted total
) -> Tensor:  # [] float32, 0 of no weight
    mean = torch.empty((), dtype=torch.float32, device=sums.device)
    launch(_mean, (1,), sums, num_warps=1, sums=sums, mean=mean)
    return mean
