"""The scalars of a run, iteration by iteration."""

from __future__ import annotations

import errno
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Self

from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

from semiseg.engine.run_directory import RunDirectory

INTERVAL = 10  # iterations


class MetricsLog:
    """Scalars of every iteration, to JSON lines and TensorBoard.

    Values are kept as tensors and read INTERVAL iterations at a time, so that a GPU is not made to wait every step.
    Leaving its context does not write what is pending; `flush` does.
    """

    def __init__(
        self,
        run: RunDirectory,
        sizes: Mapping[str, int] | None = None,  # of the files, as `sizes` gave them; what follows is cut off
    ):
        """Raises ValueError where a file is shorter than `sizes` says, OSError where one cannot be written."""
        self.run = run
        sizes = sizes or {"metrics": 0, "events": 0}
        run.tensorboard.mkdir(exist_ok=True)
        self._lines = _GrowingFile(run.metrics, sizes["metrics"])
        self._events = _GrowingFile(run.events, sizes["events"])
        # Not SummaryWriter: its thread would report a full disk by a traceback, and has no place to resume from.
        self._records = RecordWriter(self._events)
        if not self._events.size:
            self._add_event(Event(file_version="brain.Event:2"))
        self._pending: list[tuple[int, str, dict]] = []
        self.latest: dict[str, float] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._lines.close()
        self._events.close()

    def add(self, iteration: int, stage: str, values: dict) -> None:
        """Log scalars (tensors or floats) of an iteration, counted from 1 over all stages.

        Raises FloatingPointError naming the iteration where the total loss is NaN or infinite; it may come up to
        INTERVAL iterations late.
        """
        self._pending.append((iteration, stage, values))
        if len(self._pending) >= INTERVAL:
            self.flush()

    def flush(self) -> None:
        """Write what is pending; raises as `add` does, and OSError where the disk is full."""
        pending, self._pending = self._pending, []
        for iteration, stage, values in pending:
            numbers = {key: float(value) for key, value in values.items()}
            if not abs(numbers.get("total", 0.0)) < float("inf"):
                raise FloatingPointError(f"the loss is {numbers['total']} at iteration {iteration} ({stage})")
            line = json.dumps({"iteration": iteration, "stage": stage, **numbers})
            self._lines.write(line.encode() + b"\n")
            scalars = [Summary.Value(tag=key, simple_value=number) for key, number in numbers.items()]
            self._add_event(Event(step=iteration, summary=Summary(value=scalars)))
            self.latest = numbers

    def sizes(self) -> dict[str, int]:
        """Bytes of both files once everything is on the disk, from which another log can continue."""
        self.flush()
        self._lines.sync()
        self._events.sync()
        return {"metrics": self._lines.size, "events": self._events.size}

    def _add_event(self, event: Event) -> None:
        event.wall_time = time.time()
        self._records.write(event.SerializeToString())


class _GrowingFile:
    """A file that grows by whole records: one the disk has no room for is taken back."""

    def __init__(
        self,
        path: Path,
        size: int,  # bytes to keep of a file that is there already
    ):
        self._path, self.size = path, size
        self._file = path.open("ab", buffering=0)
        if os.path.getsize(path) < size:
            raise ValueError(f"{path} is damaged: its checkpoint was written when it had {size} bytes")
        self._file.truncate(size)

    def write(self, record: bytes) -> None:
        try:
            if self._file.write(record) < len(record):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            self._file.truncate(self.size)
            raise OSError(f"cannot write {self._path}: {error.strerror}") from None
        self.size += len(record)

    def sync(self) -> None:
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()
