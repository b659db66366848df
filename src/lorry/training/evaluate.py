"""Held-out measurements of several jobs at once."""

from __future__ import annotations

from collections.abc import Sequence

from .joint import Base, Share, evaluate_pass, grouped
from .objectives import Tally
from .run import Run


def evaluate(
    base: Base, runs: Sequence[Run], max_pad_ratio: float | None, max_tokens: int | None
) -> dict[str, dict[str, float]]:
    """Evaluate jobs on their held-out rows; jobs without any are left out.

    Args:
        base: the model.
        runs: jobs that have begun.
        max_pad_ratio: how passes are shared; see `grouped`.
        max_tokens: likewise.

    Returns:
        Metrics by job: ``loss`` and, by objective, ``perplexity``, ``accuracy`` and others.
    """
    waiting = {
        run.name: _batches(run) for run in runs if run.prepared is not None and run.prepared.evaluation is not None
    }
    sums: dict[str, Tally] = {}
    with base.mode(training=False):
        while waiting:
            shares = [batches.pop(0) for batches in waiting.values()]
            for group in grouped(shares, max_pad_ratio, max_tokens):
                for share, tally in zip(group, evaluate_pass(base, group), strict=True):
                    before = sums.get(share.name)
                    sums[share.name] = tally if before is None else before + tally  # type: ignore[operator]
            waiting = {name: batches for name, batches in waiting.items() if batches}
    return {name: tally.metrics() for name, tally in sums.items()}


def _batches(run: Run) -> list[Share]:
    """Rows sorted by length, so that padding is small; the sums do not depend on the order."""
    assert run.prepared is not None and run.prepared.evaluation is not None
    rows = sorted(run.prepared.evaluation.rows, key=len)
    size = run.job.eval_batch_size
    made = run.prepared
    return [Share(run.name, made.objective, rows[i : i + size], made.classes) for i in range(0, len(rows), size)]
