"""Held-out measurements of several jobs at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from lorry.core.method.start import mix_seed

from .joint import Base, Share, evaluate_pass, grouped
from .run import Run
from .task import Setting, Tally


def evaluate(
    base: Base,
    runs: Sequence[Run],
    max_pad_ratio: float | None,
    max_tokens: int | None,
    one_pass: Callable[[Base, Sequence[Share]], list[Any]] = evaluate_pass,
) -> dict[str, dict[str, float]]:
    """Evaluate jobs on their held-out examples; jobs without any are left out.

    Parameters
    ----------
    base
        The model.
    runs
        Jobs that have begun.
    max_pad_ratio, max_tokens
        How passes are shared; see `grouped`.
    one_pass
        Gives the sums of the shares of a pass, or nothing where another process has them.

    Returns
    -------
    dict
        Metrics by job: ``loss`` and, by objective, ``perplexity``, ``accuracy`` and others; for jobs with dynamics that
        ask for it, those of each task as ``METRIC/TASK``, too.
    """
    waiting = {
        run.name: _batches(run, base.setting)
        for run in runs
        if run.prepared is not None and run.prepared.evaluation is not None
    }
    sums: dict[str, Tally] = {}
    apart = {run.name: run for run in runs if run.acting.by_task}
    of_task: dict[str, dict[int, Tally]] = {}
    with base.mode(training=False):
        while waiting:
            shares = [batches.pop(0) for batches in waiting.values()]
            for group in grouped(shares, max_pad_ratio, max_tokens):
                for share, tally in zip(group, one_pass(base, group), strict=False):
                    before = sums.get(share.name)
                    sums[share.name] = tally if before is None else before + tally
                    if share.name in apart and share.task_ids is not None:
                        own = of_task.setdefault(share.name, {})
                        number = share.task_ids[0]
                        own[number] = own[number] + tally if number in own else tally
            waiting = {name: batches for name, batches in waiting.items() if batches}
    found = {name: tally.metrics() for name, tally in sums.items()}
    for name, tallies in of_task.items():
        names = apart[name].task_names
        for number in sorted(tallies):
            # a task that is held out only has no name
            label = names[number] if number < len(names) else str(number)
            found[name] |= {f"{metric}/{label}": value for metric, value in tallies[number].metrics().items()}
    return found


def _batches(run: Run, setting: Setting) -> list[Share]:
    """Return examples sorted by size, so that padding is small, drawn alike in every evaluation.

    Where tasks are told apart, no share has examples of two.
    """
    assert run.prepared is not None and run.prepared.evaluation is not None
    made, held = run.prepared, run.prepared.evaluation
    tags = held.task_ids if run.acting.by_task and held.task_ids is not None else (0,) * len(held)
    kin = {i: made.task.kin(held[i]) for i in range(len(held))}
    order = sorted(range(len(held)), key=lambda i: (tags[i], made.task.cost(held[i]), repr(kin[i])))
    shares = []
    start = 0
    while start < len(order):
        most = order[start : start + run.job.eval_batch_size]
        chosen = [i for i in most if (tags[i], kin[i]) == (tags[most[0]], kin[most[0]])]
        generator = torch.Generator().manual_seed(mix_seed(run.job.seed, "evaluate", start))
        examples = made.task.draw(held.take(chosen), generator, setting, run.name)
        shares.append(Share(run.name, made, examples, held.ids(chosen)))
        start += len(chosen)
    return shares
