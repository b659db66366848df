"""One micro-batch of every job at a time, rows padded to the longest of their pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

from torch import nn

from lorry.core.errors import OptionError
from lorry.core.options import option
from lorry.training.jobs import Job
from lorry.training.joint import Share, grouped
from lorry.training.pass_planner import PassPlanner, register_planner
from lorry.training.planning.memory import row_length, rows_within


@register_planner("joined")
@dataclass(frozen=True)
class Joined(PassPlanner):
    """Every job's next micro-batch, in as few passes as padding and memory allow."""

    max_pad_ratio: float | None = option(
        2.0, "Most tokens of a pass, padding included, as a multiple of those alone; null joins all.", at_least=1
    )
    max_tokens: int | None = option(None, "Most tokens of a pass, padding included.", at_least=1)

    def within(self, model: nn.Module, jobs: Sequence[Job], limit: int) -> Self:
        """Return it with the `max_tokens` that memory allows, for rows as long as each job lets them be."""
        length = max(row_length(job) for job in jobs)
        most = rows_within(model, jobs, length, limit)
        large = max(jobs, key=lambda job: job.batch_size)
        if large.batch_size > most:
            raise OptionError(
                f"Training within {limit:,} bytes allows {most} rows of {length} tokens in a pass, but job "
                f"'{large.name}' has batches of {large.batch_size}. Set its batch_size to at most {most} and "
                "gradient_accumulation_steps higher, lower max_length, or raise max_memory."
            )
        tokens = most * length
        return replace(self, max_tokens=tokens if self.max_tokens is None else min(tokens, self.max_tokens))

    def passes(self, shares: Sequence[Share]) -> list[list[Share]]:
        """Return the shares in passes of one family each."""
        return grouped(shares, self.max_pad_ratio, self.max_tokens)
