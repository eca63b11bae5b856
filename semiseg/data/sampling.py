"""Batches of labelled and unlabelled patches without end."""

import math
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from semiseg.data.augmentation import Augmentation, Stored, Transformation
from semiseg.data.training_tensors import TrainingTensors

_Drawn = tuple[Sequence[Stored], Transformation]  # a case and what happens to it
_Batch = tuple[Tensor, ...]  # images [Bl, M, *P], labels [Bl, 1, *P], unlabelled images, where they are stored


class TrainingSampler:
    """Draws labelled and unlabelled batches; each stream goes through shuffled permutations of its cases.

    A batch holds no case twice unless there are fewer cases than it needs; what a permutation has left when
    it no longer fills a batch is dropped. All batches follow from `seed`; load_state_dict continues exactly.
    With n processes, each draws the same batches and keeps every n-th case, starting at its own number; together
    they hold what one process would, and each has its part of either half of a batch. Of images left in their
    files the next batch is read while the last is trained on. Raises ValueError for a negative batch, one drawn
    from no cases, or one that the processes do not divide.
    """

    def __init__(
        self,
        tensors: TrainingTensors,
        augmentation: Augmentation,
        labelled_batch: int,
        unlabelled_batch: int,
        seed: int,
        process: int = 0,
        processes: int = 1,
    ) -> None:
        self._share = slice(process, None, processes)
        self._tensors = tensors
        self._augmentation = augmentation
        self._generator = torch.Generator().manual_seed(seed)
        self._labelled_stream = _Stream("labelled", len(tensors.labelled), labelled_batch, processes)
        self._unlabelled_stream = _Stream("unlabelled", len(tensors.unlabelled), unlabelled_batch, processes)
        self._reader = ThreadPoolExecutor(1) if tensors.on_disk else None
        self._upcoming: Future[_Batch] | None = None
        self._state_before: dict[str, Any] | None = None  # the upcoming batch was drawn

    def next(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return labelled image [Bl, M, *P] float32, label [Bl, *P] uint8, unlabelled image [Bu, M, *P].

        Bl and Bu are the batches divided by the number of processes. They are new tensors on the device that
        trains, and nothing waits until they are there.
        """
        batch = self._draw()() if self._reader is None else self._read_ahead(self._reader)
        image, label, unlabelled = (tensor.to(self._tensors.device, non_blocking=True) for tensor in batch)
        return image, label[:, 0], unlabelled

    def state_dict(self) -> dict[str, Any]:
        """Return what is needed to continue exactly: tensors and integers."""
        return self._state() if self._state_before is None else self._state_before

    def _state(self) -> dict[str, Any]:
        return {
            "generator": self._generator.get_state(),
            "labelled": self._labelled_stream.state_dict(),
            "unlabelled": self._unlabelled_stream.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from state_dict(); raises ValueError if it was taken with another number of cases."""
        self._labelled_stream.load_state_dict(state["labelled"])
        self._unlabelled_stream.load_state_dict(state["unlabelled"])
        self._generator.set_state(state["generator"])
        self._upcoming = self._state_before = None

    def _read_ahead(self, reader: ThreadPoolExecutor) -> _Batch:
        upcoming = self._upcoming or reader.submit(self._draw())
        self._state_before = self._state()
        self._upcoming = reader.submit(self._draw())
        return upcoming.result()

    def _draw(self) -> Callable[[], _Batch]:
        """Draw a batch; what is returned makes it."""
        tensors = self._tensors
        image, label = (tensors.channels, torch.float32), (1, torch.uint8)
        labelled = self._draw_cases(tensors.labelled, self._labelled_stream)
        unlabelled = self._draw_cases(tensors.unlabelled, self._unlabelled_stream)
        return lambda: (*self._transformed(labelled, image, label), *self._transformed(unlabelled, image))

    def _draw_cases(self, cases: Sequence[Sequence[Stored]], stream: "_Stream") -> list[_Drawn]:
        return [
            (cases[i], self._augmentation.draw(cases[i][0].shape[1:], self._generator))
            for i in stream.next(self._generator)
        ][self._share]  # the others were only drawn

    def _transformed(
        self,
        drawn: Sequence[_Drawn],
        *forms: tuple[int, torch.dtype],  # M and dtype of each of a case's tensors
    ) -> list[Tensor]:  # [B, M, *P] each
        device, storage = self._tensors.device, self._tensors.storage
        # Only from pinned memory does a copy to a GPU run while the processor goes on.
        pinned = device.type == "cuda" and storage.type == "cpu"
        count, patch = len(drawn), self._augmentation.patch
        batch = [
            torch.empty((count, channels, *patch), dtype=dtype, device=storage, pin_memory=pinned)
            for channels, dtype in forms
        ]
        for number, (case, transform) in enumerate(drawn):
            transform(case, [tensor[number] for tensor in batch])
        return batch


class _Stream:
    """Indices of `count` cases in shuffled permutations, `batch` at a time."""

    def __init__(self, name: str, count: int, batch: int, processes: int) -> None:
        if batch % processes:
            raise ValueError(
                f"training.{name}_batch is {batch}, accepted for {processes} processes are multiples of {processes}"
            )
        if batch < 0 or (batch and not count):
            raise ValueError(
                f"training.{name}_batch is {batch}, accepted with {count} {name} cases "
                f"{'are values from 0' if count else 'is 0'}"
            )
        self._name, self._count, self._batch = name, count, batch
        self._order = torch.empty(0, dtype=torch.int64)
        self._position = 0

    def next(self, generator: torch.Generator) -> list[int]:
        if self._position + self._batch > len(self._order):
            permutations = math.ceil(self._batch / self._count)
            shuffled = [torch.randperm(self._count, generator=generator) for _ in range(permutations)]
            self._order, self._position = torch.cat(shuffled), 0
        start, self._position = self._position, self._position + self._batch
        return self._order[start : self._position].tolist()

    def state_dict(self) -> dict[str, Any]:
        return {"count": self._count, "order": self._order.clone(), "position": self._position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state["count"] != self._count:
            raise ValueError(f"state has {state['count']} {self._name} cases; this sampler has {self._count}")
        self._order, self._position = state["order"].clone(), int(state["position"])
