"""Rounds of a fleet's planner, carried out: passes, and the optimizer steps that they complete."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from lorry.core.method.start import mix_seed

from .evaluate import evaluate
from .joint import Base, Share, train_pass
from .pass_planner import PassPlanner
from .processes import Processes
from .run import Run
from .split_pass import train_split_pass

#: The jobs that completed a step, with its metrics; None for one that failed in it.
Done = dict[str, dict[str, Any] | None]


class Rounds:
    """Passes one after another, all rows in this process, or a part of each pass' rows in each of several.

    Parameters
    ----------
    base
        The model.
    planner
        Of the passes.
    processes
        Of which this is one.
    """

    def __init__(self, base: Base, planner: PassPlanner, processes: Processes) -> None:
        self.base = base
        self.planner = planner
        self.processes = processes

    def __call__(self, runs: Mapping[str, Run], tick: int) -> Iterator[Done]:
        """Carry out a round of jobs that have opened a step; yields after each pass.

        Parameters
        ----------
        runs
            By name.
        tick
            Number of the round.
        """
        for number, group in enumerate(self.planned(runs)):
            done = self._pass(runs, group, mix_seed("base", tick, number))
            if done is not None:
                yield done

    def evaluate(self, runs: Sequence[Run], ratio: float | None, tokens: int | None) -> dict[str, dict[str, float]]:
        """Return the metrics of jobs on what they hold out; see `evaluate.evaluate`."""
        return dict(self.processes.told(evaluate(self.base, runs, ratio, tokens)))

    def planned(self, runs: Mapping[str, Run]) -> Sequence[Sequence[Share]]:
        """Return the passes of a round: the first process plans them, since a solver may end elsewhere in each."""
        shares = self.shares(runs)
        if not self.processes.several or not self.planner.steps_ahead:
            return self.planner.passes(shares)
        plan = self.planner.passes(shares) if self.processes.first else []
        whole = {(share.name, share.step): share for share in shares}
        found = self.processes.told([[(s.name, s.step, s.chosen) for s in group] for group in plan])
        return [[whole[name, step].part_of(chosen) for name, step, chosen in group] for group in found]

    def shares(self, runs: Mapping[str, Run]) -> list[Share]:
        """Return what the planner plans: the next micro-batch of each job, or whole steps of it."""
        ahead = self.planner.steps_ahead
        if not ahead:
            return [run.share() for run in runs.values()]
        return [share for run in runs.values() for share in run.ahead(self.steps_of(run, ahead))]

    def steps_of(self, run: Run, most: int) -> int:
        """Return how many steps of a job may be in a round."""
        return most

    def _pass(self, runs: Mapping[str, Run], planned: Sequence[Share], seed: int) -> Done | None:
        """One joint pass, for those of its jobs that still run; a pass without any is a no-op."""
        for share in planned:
            if runs[share.name].running:
                runs[share.name].open_step()
        group = [share for share in planned if runs[share.name].running]
        if not group:
            return None
        if self.processes.several:
            train_split_pass(self.base, group, seed, self.processes)
        else:
            train_pass(self.base, group, seed)
        complete = [runs[share.name] for share in group if runs[share.name].take(share)]
        self.processes.add_up([p for run in complete for p in parameters_of(run)])
        return {run.name: run.finish_step() for run in complete}


def parameters_of(run: Run) -> list[nn.Parameter]:
    """Return what a job trains; nothing for one that failed before it began."""
    return [] if run.adapter is None else run.adapter.parameters()
