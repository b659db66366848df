"""The learning rate of a job, found by a short sweep: many rates at once, as one fleet on the frozen base."""

from __future__ import annotations

import dataclasses
import json
import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lorry.core.errors import LorryError, OptionError
from lorry.core.life.api import adapters

from .fleet import Fleet
from .jobs import Job

#: Rates that are tried at first: half a decade apart.
RATES = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
#: Part of the data that is held out where the job says nothing.
HELD_OUT = 0.1


@dataclass(frozen=True)
class RateTrial:
    """One rate of a sweep: the held-out loss before and after, None where there is none, and how it ended."""

    rate: float
    start: float | None
    loss: float | None
    status: str


@dataclass(frozen=True)
class RateAdvice:
    """What a sweep found.

    Attributes
    ----------
    rate
        The rate with the lowest held-out loss.
    trials
        All rates that were tried, in ascending order.
    steps
        Optimizer steps of each.
    at_edge
        Whether the best is the smallest or the largest rate tried, so that a better one may lie beyond.
    picture
        Where the plot is; None without an output folder or matplotlib.
    """

    rate: float
    trials: tuple[RateTrial, ...]
    steps: int
    at_edge: bool
    picture: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the advice as plain data for JSON."""
        return {**dataclasses.asdict(self), "trials": [dataclasses.asdict(t) for t in self.trials]}

    def __str__(self) -> str:
        """Return the advice in a sentence."""
        more = " It is at the edge of what was tried." if self.at_edge else ""
        return (
            f"Of {len(self.trials)} rates, {self.rate:g} has the lowest held-out loss after {self.steps} steps.{more}"
        )


def find_rate(
    model: nn.Module,
    tokenizer: Any,
    job: Job | Mapping[str, Any],
    output: str | Path | None = None,
    *,
    rates: Sequence[float] = RATES,
    steps: int = 50,
    widen: int = 2,
    **options: Any,
) -> RateAdvice:
    """Train a job with several learning rates at once for a few steps, and choose by held-out loss.

    All have the same start, data and seed, so that they differ in their rate alone; the result is the same at every
    call. The model is as before afterwards: no adapter stays.

    Parameters
    ----------
    model, tokenizer
        As of `lorry.training.fleet.Fleet`.
    job
        What is to be trained. Without held-out data of its own, a tenth of the data is held out.
    output
        Folder for ``rates.json`` and ``rates.png``; nothing is kept if not given.
    rates
        Those of the first fleet.
    steps
        Optimizer steps of each; fewer if the job itself has fewer.
    widen
        How often two more rates are tried beyond the grid, while the best one lies at its edge.
    options
        Of the fleet, such as ``max_tokens`` to bound the memory of a pass.

    Raises
    ------
    OptionError
        Fewer than two rates, or not all positive.
    LorryError
        No rate came to an end; the first reason.
    """
    job = job if isinstance(job, Job) else Job.from_dict(job)
    grid = sorted({float(rate) for rate in rates})
    if len(grid) < 2 or grid[0] <= 0 or steps < 1:
        raise OptionError(f"A sweep needs two positive rates and one step, found rates {list(rates)}, steps {steps}.")
    steps = min(steps, job.steps or steps)
    factor = (grid[-1] / grid[0]) ** (1 / (len(grid) - 1))
    trials: dict[float, RateTrial] = {}
    fresh = grid
    for _ in range(widen + 1):
        trials |= _sweep(model, tokenizer, job, fresh, steps, options)
        tried = sorted(trials)
        best = _best(trials)
        if best not in (tried[0], tried[-1]):
            break
        at, step = (tried[0], 1 / factor) if best == tried[0] else (tried[-1], factor)
        fresh = [float(f"{at * step**power:.3g}") for power in (1, 2)]
    ordered = tuple(trials[rate] for rate in sorted(trials))
    advice = RateAdvice(best, ordered, steps, best in (ordered[0].rate, ordered[-1].rate))
    return advice if output is None else _kept(advice, Path(output))


def _sweep(
    model: nn.Module, tokenizer: Any, job: Job, rates: Sequence[float], steps: int, options: Mapping[str, Any]
) -> dict[float, RateTrial]:
    """Train all rates as one fleet and take their adapters off again."""
    shared: dict[str, Any] = {"steps": steps, "epochs": None, "eval_every": 0, "patience": None, "keep_best": False}
    if job.eval_data is None and not job.hold_out:
        shared["hold_out"] = HELD_OUT
    if job.warmup >= 1:  # counted in steps of the whole run
        shared["warmup"] = min(job.warmup, steps // 10)
    named = {f"{job.name[:96]}-rate-{rate:g}".replace("+", ""): rate for rate in rates}
    jobs = [dataclasses.replace(job, name=name, learning_rate=rate, **shared) for name, rate in named.items()]
    there = set(adapters(model))
    with tempfile.TemporaryDirectory() as folder, torch.random.fork_rng():
        try:
            result = Fleet(model, tokenizer, jobs, folder, **{"progress": False, **options}).train()
        finally:  # whatever ends the sweep
            for name, adapter in adapters(model).items():
                if name not in there:
                    adapter.detach()
    found = {}
    for name, rate in named.items():
        said = result[name]
        held = said["eval"] or {}
        start, end = (held.get(key, {}).get("loss") for key in ("start", "end"))
        found[rate] = RateTrial(rate, start, end if said["status"] == "done" else None, said["status"])
    return found


def _best(trials: Mapping[float, RateTrial]) -> float:
    ended = [t for t in trials.values() if t.loss is not None and math.isfinite(t.loss)]
    if not ended:
        reason = next(iter(trials.values())).status
        raise LorryError(f"No rate of the sweep came to an end with a held-out loss: {reason}.")
    return min(ended, key=lambda t: (t.loss, t.rate)).rate


def _kept(advice: RateAdvice, folder: Path) -> RateAdvice:
    """Write the table and the picture."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "rates.png"
    if _draw(advice, path):
        advice = dataclasses.replace(advice, picture=str(path))
    draft = folder / ".rates.json.draft"
    draft.write_text(json.dumps(advice.to_dict(), indent=2) + "\n", encoding="utf-8")
    draft.replace(folder / "rates.json")
    return advice


def _draw(advice: RateAdvice, path: Path) -> bool:
    """Draw held-out loss over the rate; False without matplotlib."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(7, 4), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    ended = [(t.rate, t.loss) for t in advice.trials if t.loss is not None]
    axes.plot([rate for rate, _ in ended], [loss for _, loss in ended], "o-", label="after the sweep")
    start = next((t.start for t in advice.trials if t.start is not None), None)
    if start is not None:
        axes.axhline(start, color="gray", linestyle=":", label="before")
    axes.axvline(advice.rate, color="C2", linestyle="--", label=f"best: {advice.rate:g}")
    axes.set_xscale("log")
    axes.set_xlabel("learning rate")
    axes.set_ylabel("held-out loss")
    axes.set_title(f"Held-out loss after {advice.steps} steps")
    axes.grid(alpha=0.25)
    axes.legend(fontsize=8)
    draft = path.with_name(f".{path.name}.draft")
    figure.savefig(draft, format="png")
    draft.replace(path)
    return True
