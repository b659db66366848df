"""Processes that train together: who runs which rows, sums over all of them, and one end for all if one fails.

Every process reads the same data, plans the same passes and holds all tensors of all adapters; what differs is whose
rows it runs. Gradients are summed before an optimizer steps, so that clipping, optimizers, dynamics and schedules run
alike everywhere, and what the first process writes is whole.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from lorry.core.errors import LorryError

#: Where the process that failed first leaves its number.
_FAILED = "failed"


class ProcessError(LorryError):
    """A process of several failed.

    Attributes
    ----------
    own
        Whether it is this one, which then is the one to say so.
    """

    def __init__(self, message: str, own: bool) -> None:
        super().__init__(message)
        self.own = own


@dataclass(frozen=True)
class Processes:
    """One process among those that train together; alone by default.

    Attributes
    ----------
    rank, size
        Its number from 0, and how many there are.
    device
        Where it computes; None leaves the model where it is.
    store
        What all of them reach while collectives fail.
    """

    rank: int = 0
    size: int = 1
    device: torch.device | None = None
    store: Any = field(default=None, repr=False)

    @property
    def several(self) -> bool:
        """Whether there are others."""
        return self.size > 1

    @property
    def first(self) -> bool:
        """Whether it is the one that writes files and speaks."""
        return self.rank == 0

    # -- sums and agreements; all processes call them in the same order

    def summed(self, values: Tensor) -> Tensor:
        """Return the sum of every process' values; `values` are changed."""
        if self.several:
            dist.all_reduce(values)
        return values

    def add_up(self, parameters: Sequence[nn.Parameter]) -> None:
        """Sum the gradients of parameters over all processes; where no process has one there is none after."""
        if not self.several or not parameters:
            return
        there = torch.tensor([p.grad is not None for p in parameters], dtype=torch.float32)
        wanted = self.summed(there).tolist()
        chosen = [p for p, count in zip(parameters, wanted, strict=True) if count]
        for dtype in dict.fromkeys(p.dtype for p in chosen):  # in the same order everywhere
            alike = [p for p in chosen if p.dtype == dtype]
            grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in alike]
            flat = self.summed(torch.cat([g.flatten() for g in grads]))
            for p, part in zip(alike, flat.split([p.numel() for p in alike]), strict=True):
                p.grad = part.view_as(p).clone()

    def settle(self, parameters: Sequence[nn.Parameter]) -> None:
        """Bring the gradients of a step under way to the first process, which is going to write them."""
        self.add_up(parameters)
        self.forget(parameters)

    def forget(self, parameters: Sequence[nn.Parameter]) -> None:
        """Forget gradients that the first process has, too: they count once."""
        if not self.first:
            for p in parameters:
                p.grad = None

    def in_step(self, stop: bool, *counts: int) -> bool:
        """Return whether one of them wants to stop, after a check that all have counted the same.

        Raises
        ------
        ProcessError
            They have not, so that one would wait for another for ever.
        """
        if not self.several:
            return stop
        wanted, *found = self.summed(torch.tensor([stop, *counts], dtype=torch.float64)).tolist()
        if found != [count * self.size for count in counts]:
            raise ProcessError(
                "The processes of this run have done different things, so they cannot go on together: do they have the "
                "same data, versions and run file?",
                own=self.first,
            )
        return bool(wanted)

    def told(self, value: Any, source: int = 0) -> Any:
        """Return what one process, the first if no other is named, has here; plain data as JSON knows it."""
        if not self.several:
            return value
        coded = json.dumps(value).encode() if self.rank == source else b""
        length = torch.tensor([len(coded)])
        dist.broadcast(length, source)
        data = torch.empty(int(length), dtype=torch.uint8)
        if self.rank == source:
            data.copy_(torch.frombuffer(bytearray(coded), dtype=torch.uint8))
        dist.broadcast(data, source)
        return json.loads(bytes(data.tolist()).decode())

    # -- failures

    @contextmanager
    def one_end(self) -> Iterator[None]:
        """Let the failure of one process end all, with one message.

        Raises
        ------
        ProcessError
            `ProcessError.own` in the process that failed first; the others, which lost contact with it, say nothing.
        """
        try:
            yield
        except (Exception, SystemExit) as error:
            if not self.several or isinstance(error, ProcessError):
                raise
            if _failed_first(self.store, self.rank) != self.rank:
                raise ProcessError("Another process of this run failed.", own=False) from error
            if isinstance(error, LorryError | SystemExit):  # what is wrong in the run file is wrong in all of them
                raise
            if not _lost(error):
                said = f"{type(error).__name__}: {error}"
                raise ProcessError(f"Process {self.rank} of {self.size} failed: {said}", own=True) from error
            raise ProcessError(
                f"Process {self.rank} of {self.size} lost contact with another one, which ended without a word (killed "
                "for memory, perhaps). Free memory or take more processes, and go on from the last checkpoint with "
                "--resume.",
                own=True,
            ) from error

    def leave(self) -> None:
        """End the group; to be called by all once nothing more is to be done together."""
        if self.several and dist.is_initialized():
            dist.barrier()
            dist.destroy_process_group()


def launched() -> int:
    """Return how many processes a launcher (torchrun, accelerate) started; 1 without one."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1


def join() -> Processes:
    """Join the processes that ``torchrun`` or ``accelerate launch`` started; without a launcher, be alone.

    Where there is a GPU for each process of a machine it computes there (NCCL), else on the processor (gloo).
    """
    if launched() == 1:
        return Processes()
    device = None
    if torch.cuda.is_available() and torch.cuda.device_count() >= int(os.environ.get("LOCAL_WORLD_SIZE", "1")):
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    found, rank, size = next(iter(rendezvous("env://")))
    # a launcher's store outlives a group: what one run left there is not for the next
    store = PrefixStore(f"lorry/{found.add(f'lorry/runs/{rank}', 1)}", found)
    if not dist.is_initialized():
        backend = "gloo" if device is None else "cpu:gloo,cuda:nccl"
        dist.init_process_group(backend, store=store, rank=rank, world_size=size)
    return Processes(rank, size, device, store)


def _failed_first(store: Any, rank: int) -> int:
    """Return which process failed first; this one if nobody else said so before."""
    try:
        return int(store.compare_set(_FAILED, "", str(rank)))
    except (RuntimeError, ValueError):  # the process that kept the store is gone
        return -1 if rank else rank


def _lost(error: BaseException) -> bool:
    """Return whether an error says that another process is gone."""
    words = ("gloo", "NCCL", "Connection", "connection", "Broken pipe", "timed out", "Timed out")
    return isinstance(error, RuntimeError | OSError) and any(word in str(error) for word in words)
