"""How much may go through the base in one pass, so that training stays within some memory; by `training.estimate`."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from torch import nn

from lorry.core.errors import OptionError
from lorry.training.estimate import estimate_training, largest
from lorry.training.jobs import Job

#: Tokens of each job by which the bound of a pass without padding is looked for.
STEP = 16


def row_length(job: Job) -> int:
    """Return the most tokens that a row of a job may have."""
    return int(getattr(job.make_objective(), "max_length", None) or 512)


def rows_within(model: nn.Module, jobs: Sequence[Job], length: int, limit: int) -> int:
    """Return how many rows of a length may be in one pass, of whichever jobs.

    Parameters
    ----------
    model
        The base without adapters.
    jobs
        Of the fleet; adapters, gradients and optimizer states of all of them count.
    length
        Tokens of a row, padding included.
    limit
        Bytes of everything: weights, adapters, gradients, states of optimizers, one pass.

    Raises
    ------
    OptionError
        Not even one row fits, or the memory of a job cannot be estimated.
    """
    held = estimate_training(model, _single(jobs), length=1).memory
    kept = held.total - held.activations

    def memory(rows: int) -> int:
        alone = (dataclasses.replace(job, batch_size=rows) for job in _single(jobs))
        return kept + max(estimate_training(model, job, length=length).memory.activations for job in alone)

    most = largest(memory, limit)
    if not most:
        raise OptionError(
            f"A pass of one row of {length} tokens takes {memory(1):,} bytes with weights and adapters, but max_memory "
            f"is {limit:,}. Raise it, lower max_length, train fewer jobs at once, or load the base in a smaller dtype."
        )
    return most


def tokens_within(model: nn.Module, jobs: Sequence[Job], limit: int) -> int:
    """Return how many tokens may be in one pass without padding, shared evenly by the jobs; see `rows_within`."""
    least, single = len(jobs) * STEP, _single(jobs)

    def memory(times: int) -> int:
        return estimate_training(model, single, length=times * STEP, padding_free=True).memory.total

    most = largest(memory, limit, most=1 << 16)
    if not most:
        raise OptionError(
            f"A pass of {least} tokens takes {memory(1):,} bytes with weights and adapters, but max_memory is "
            f"{limit:,}. Raise it, train fewer jobs at once, or load the base in a smaller dtype."
        )
    return most * least


def _single(jobs: Sequence[Job]) -> list[Job]:
    """Return the jobs with one row in a pass, and gradients of passes before."""
    return [dataclasses.replace(job, batch_size=1, gradient_accumulation_steps=2) for job in jobs]
