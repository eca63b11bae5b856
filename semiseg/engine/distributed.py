"""The processes that train one model together: which of them this is, and what they tell each other."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta

import torch
from torch import Tensor, distributed, nn

from semiseg.config import Config
from semiseg.engine.seeds import PROCESSES, derived_seed
from semiseg.methods import METHODS
from semiseg_kernels import use_process_group

STEP_TIMEOUT = timedelta(minutes=10)  # for one exchange; longer means that a process hangs
JOIN_TIMEOUT = timedelta(hours=2)  # for all to have read their data; longer means that one is missing
WORK_TIMEOUT = timedelta(days=2)  # for what one process does alone, such as evaluating


class Processes:
    """The processes of this training: those that torchrun started, or this one alone.

    rank: this process's number, from 0. count: how many there are, on all machines. They are read from the
    environment variables of torchrun (RANK, WORLD_SIZE, LOCAL_RANK). With one process nothing here does anything.
    """

    def __init__(self) -> None:
        self.count = int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1
        self.rank = int(os.environ["RANK"]) if self.count > 1 else 0
        self._local_rank = int(os.environ.get("LOCAL_RANK", str(self.rank)))
        # Both through the CPU, with the timeout of a step and without.
        self._step_group: distributed.ProcessGroup | None = None
        self._work_group: distributed.ProcessGroup | None = None

    @property
    def is_main(self) -> bool:
        """Whether this is the one process that writes and prints."""
        return self.rank == 0

    def check(self, config: Config) -> None:
        """Raise ValueError where the processes cannot share the configuration's batches or device evenly."""
        if self.count == 1:
            return
        multiple = self.count * METHODS[config.method.name].batch_multiple
        for key in ("labelled_batch", "unlabelled_batch"):
            batch = getattr(config.training, key)
            if batch % multiple:
                raise ValueError(
                    f"training.{key} is {batch}, accepted for {config.method.name} on {self.count} processes are "
                    f"multiples of {multiple}"
                )

    def own_device(self, device: torch.device) -> torch.device:
        """The device of this process, given the kind that was asked for: of several GPUs its own.

        Raises ValueError where the machine has fewer GPUs than processes, or one GPU was asked for by number.
        """
        if self.count == 1 or device.type != "cuda":
            return device
        if device.index is not None:
            raise ValueError(
                f"training.device is {device}, accepted on several processes are auto, cpu and cuda"
            )
        if self._local_rank >= torch.cuda.device_count():
            raise ValueError(
                f"process {self._local_rank} of this machine has no GPU of its own: PyTorch finds "
                f"{torch.cuda.device_count()}; start one process a GPU, or set training.device=cpu"
            )
        torch.cuda.set_device(self._local_rank)
        return torch.device("cuda", self._local_rank)

    @contextmanager
    def joined(self, device: torch.device) -> Iterator[None]:
        """Connect the processes; inside, losses, cluster sums and batch normalisation are those of the joined batch.

        Raises ConnectionError where another process failed, was killed or hangs.
        """
        if self.count == 1:
            yield
            return
        if not self.is_main:
            warnings.simplefilter("ignore")
        try:
            backend, own = ("nccl", device) if device.type == "cuda" else ("gloo", None)
            distributed.init_process_group(
                backend,
                store=self._meet(),
                rank=self.rank,
                world_size=self.count,
                timeout=STEP_TIMEOUT,
                device_id=own,
            )
            self._step_group = distributed.new_group(backend="gloo", timeout=STEP_TIMEOUT)
            self._work_group = distributed.new_group(backend="gloo", timeout=WORK_TIMEOUT)
            with use_process_group(distributed.group.WORLD):
                yield
            self.wait()
        except RuntimeError as error:
            if not _is_lost_connection(error):
                raise
            raise ConnectionError(
                f"process {self.rank} of {self.count} lost another, which failed, was killed or hangs; "
                "resume from the last checkpoint with --resume"
            ) from error
        finally:
            if distributed.is_initialized():
                distributed.destroy_process_group()

    def _meet(self) -> distributed.Store:
        """What the processes exchange addresses through, once all are here: each reads its data before."""
        store, _, _ = next(distributed.rendezvous("env://", timeout=JOIN_TIMEOUT))
        store.set(f"process {self.rank}", "here")
        store.wait([f"process {rank}" for rank in range(self.count)], JOIN_TIMEOUT)
        store.set_timeout(STEP_TIMEOUT)
        return store

    def seed(self, seed: int) -> None:
        """Give each process its own random numbers for dropout."""
        if self.count > 1:
            torch.manual_seed(derived_seed(seed, PROCESSES, self.rank))

    def broadcast(self, method: nn.Module) -> None:
        """Give every process the parameters and buffers of the first, once all have come this far."""
        if self.count == 1:
            return
        self.wait()
        with torch.no_grad():
            for tensor in (*method.parameters(), *method.buffers()):
                values = tensor.contiguous()
                distributed.broadcast(values, src=0)
                tensor.copy_(values)

    def average(self, tensors: Sequence[Tensor]) -> None:
        """Replace every tensor by its mean over the processes, in one communication."""
        if self.count == 1:
            return
        flat = torch.cat([tensor.to(tensors[0]).flatten() for tensor in tensors])
        distributed.all_reduce(flat)
        parts = (flat / self.count).split([tensor.numel() for tensor in tensors])
        for tensor, part in zip(tensors, parts, strict=True):
            tensor.copy_(part.view(tensor.shape))

    def any(self, flag: bool) -> bool:
        """Whether the flag is set in any process, none of which is behind by more than a step."""
        if self.count == 1:
            return flag
        flags = torch.tensor(int(flag))
        distributed.all_reduce(flags, distributed.ReduceOp.MAX, group=self._step_group)
        return bool(flags)

    def wait(self) -> None:
        """Wait until every process has come this far, for as long as one works alone."""
        if self.count > 1:
            distributed.barrier(group=self._work_group)


def gradients(method: nn.Module) -> Iterable[Tensor]:
    """The gradients that the last backward pass left."""
    return (parameter.grad for parameter in method.parameters() if parameter.grad is not None)


def _is_lost_connection(error: RuntimeError) -> bool:
    # gloo raises plain RuntimeErrors, which begin with the place in its source
    return isinstance(error, distributed.DistError) or "gloo" in str(error)
