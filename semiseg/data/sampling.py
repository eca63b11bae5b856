"""Batches of labelled and unlabelled patches without end."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from semiseg.data.augmentation import Augmentation
from semiseg.data.case import Case, UnlabelledCase


class TrainingSampler:
    """Draws labelled and unlabelled batches; each stream goes through shuffled permutations of its cases.

    A batch holds no case twice unless there are fewer cases than it needs; what a permutation has left when
    it no longer fills a batch is dropped. All batches follow from `seed`; load_state_dict continues exactly.
    Of several processes each draws the same batches and keeps every so-manieth of their cases, so that together
    they hold what one would, and a process has its part of either half of a batch. Raises ValueError for a
    negative batch, one drawn from no cases, or one that the processes do not divide.
    """

    def __init__(
        self,
        labelled: Sequence[Case],
        unlabelled: Sequence[Case | UnlabelledCase],
        augmentation: Augmentation,
        labelled_batch: int,
        unlabelled_batch: int,
        seed: int,
        process: int = 0,
        processes: int = 1,
    ) -> None:
        self._share = slice(process, None, processes)
        self._labelled = [(case.image, case.label) for case in labelled]
        # Only the image is kept: the label of an unlabelled case must not reach the trainer.
        self._unlabelled = [case.image for case in unlabelled]
        self._augmentation = augmentation
        self._generator = torch.Generator().manual_seed(seed)
        self._labelled_stream = _Stream("labelled", len(labelled), labelled_batch, processes)
        self._unlabelled_stream = _Stream("unlabelled", len(unlabelled), unlabelled_batch, processes)

    def next(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return labelled image [Bl, 1, *P] float32, label [Bl, *P] uint8, unlabelled image [Bu, 1, *P].

        Bl and Bu are the batches divided by the number of processes.
        """
        generator = self._generator
        labelled = [
            self._augmentation(*self._labelled[i], generator) for i in self._labelled_stream.next(generator)
        ]
        unlabelled = [
            self._augmentation(self._unlabelled[i], None, generator)
            for i in self._unlabelled_stream.next(generator)
        ]
        return (
            self._stack([image for image, _ in labelled], torch.float32)[:, None],
            self._stack([label for _, label in labelled], torch.uint8),
            self._stack([image for image, _ in unlabelled], torch.float32)[:, None],
        )

    def state_dict(self) -> dict[str, Any]:
        """Return what is needed to continue exactly: tensors and integers."""
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

    def _stack(self, arrays: list[Any], dtype: torch.dtype) -> Tensor:
        arrays = arrays[self._share]  # the others, mostly views, were only drawn
        batch = torch.empty(len(arrays), *self._augmentation.patch, dtype=dtype)
        for row, array in zip(batch, arrays, strict=True):
            row.copy_(torch.from_numpy(np.ascontiguousarray(array)))
        return batch


class _Stream:
    """Indices of `count` cases in shuffled permutations, `batch` at a time."""

    def __init__(self, name: str, count: int, batch: int, processes: int) -> None:
        if batch % processes:
            raise ValueError(
                f"{name}_batch is {batch}, accepted for {processes} processes are multiples of {processes}"
            )
        if batch < 0 or (batch and not count):
            raise ValueError(
                f"{name}_batch is {batch} and there are {count} {name} cases; accepted are "
                f"{'0 or more' if count else 'only 0'}"
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
