"""Sums over all programs' partial sums, in a fixed order and in float64."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from semiseg_kernels.triton.configurations import rows_per_program
from semiseg_kernels.triton.launching import launch

COLUMNS = 32


@triton.jit(do_not_specialize=["rows", "columns", "rows_per_program"])
def _add_rows(
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


def add_rows(
    partials: Tensor,  # [rows, columns]
) -> Tensor:  # [columns] float64
    """The sum of the rows: of every few hundred of them, then of those sums."""
    rows_of_program = rows_per_program(len(partials))
    while True:
        rows, columns = partials.shape
        programs = -(-rows // rows_of_program)
        sums = torch.empty(programs, columns, dtype=torch.float64, device=partials.device)
        launch(
            _add_rows, (-(-columns // COLUMNS), programs), partials, num_warps=4,
            partials=partials, sums=sums, rows=rows, columns=columns, rows_per_program=rows_of_program,
            ROWS=32, COLUMNS=COLUMNS,
        )  # fmt: skip
        if programs == 1:
            return sums[0]
        # The second pass takes however many rows the first has left.
        partials, rows_of_program = sums, programs
