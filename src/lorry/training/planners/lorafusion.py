"""Balanced passes without padding: samples of several jobs and steps packed to a capacity (LoRAFusion, 2510.00206)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

from torch import nn

from lorry.core.errors import OptionError
from lorry.core.options import option
from lorry.training.jobs import Job
from lorry.training.joint import Share
from lorry.training.pass_planner import PassPlanner, register_planner
from lorry.training.planning.memory import tokens_within
from lorry.training.planning.order import Rules, planned
from lorry.training.planning.packing import Limits, check_lengths
from lorry.training.planning.samples import Sample
from lorry.training.run import Run
from lorry.training.task import Setting, Task


@register_planner("lorafusion")
@dataclass(frozen=True)
class LoRAFusion(PassPlanner):
    """Packs the samples of the next steps of all jobs into passes of at most `capacity` tokens, one after another.

    A job's step is done when all of its samples went through, so its parameters equal those of training alone, to the
    order of sums. What depends on the company of a micro-batch differs: masks of dropout are drawn by pass, and
    auxiliary losses are taken over passes.
    """

    capacity: int = option(4096, "Most tokens of a pass.", at_least=1)
    steps: int = option(4, "Optimizer steps of each job that are planned at once.", at_least=1)
    stages: int = option(1, "Stages of the pipeline that the base lies in.", at_least=1)
    multiple: int = option(1, "A job's tokens in a pass count as rounded up to this (a kernel's tile).", at_least=1)
    slack: int | None = option(
        None, "Passes with this many tokens free are joined with later ones; a quarter of the capacity if not given."
    )
    look_ahead: int = option(8, "How many later passes are looked at for that.", at_least=0)
    solver: str = option("highs", "How samples are packed.", choices=("highs", "first-fit"))
    time_limit: float = option(10.0, "Seconds for HiGHS at one packing; then first-fit decreasing is taken.", above=0)
    node_limit: int = option(50, "Nodes of HiGHS' search tree at one packing.", at_least=1)

    @property
    def steps_ahead(self) -> int:
        """Return how many steps are planned at once."""
        return self.steps

    @property
    def rules(self) -> Rules:
        """What its plans keep to."""
        return Rules(
            self.capacity,
            self.multiple,
            self.stages,
            slack=self.capacity // 4 if self.slack is None else self.slack,
            look_ahead=self.look_ahead,
            limits=Limits(self.time_limit, self.node_limit) if self.solver == "highs" else None,
        )

    def within(self, model: nn.Module, jobs: Sequence[Job], limit: int) -> Self:
        """Return it with the `capacity` that memory allows."""
        return replace(self, capacity=min(self.capacity, tokens_within(model, jobs, limit)))

    def in_stages(self, stages: int) -> Self:
        """Return it with `stages`."""
        return replace(self, stages=stages)

    def check(self, runs: Sequence[Run], setting: Setting) -> None:
        """Refuse jobs that cannot do without padding, and samples longer than the capacity."""
        for run in runs:
            assert run.prepared is not None and run.adapter is not None
            task, train = run.prepared.task, run.prepared.train
            problem = task.padding_needed(setting, train.examples)
            if type(task).draw is not Task.draw:
                problem = f"objective '{task.name}' draws its examples anew in each pass"
            elif train.task_ids is not None:
                problem = "its rows have task ids"
            elif run.adapter.row_draws > 1:
                problem = "its method sends every row through the base several times"
            elif run.acting.row_gradients:
                problem = "one of its dynamics wants the gradient of each row"
            if problem:
                raise OptionError(
                    f"Job '{run.name}' cannot be planned by 'lorafusion', which puts rows one after another without "
                    f"padding: {problem}. Take the job out of the run, or use the planner 'joined'."
                )
            samples = [Sample(run.name, 0, i, task.cost(e)) for i, e in enumerate(train.examples)]
            check_lengths(samples, self.capacity, self.multiple)

    def passes(self, shares: Sequence[Share]) -> list[list[Share]]:
        """Return the samples of the shares in passes."""
        whole = {(share.name, share.step): share for share in shares}
        samples = [
            Sample(name, step, place, share.task.cost(example))
            for (name, step), share in whole.items()
            for place, example in enumerate(share.examples)
        ]
        passes = []
        for batch in planned(samples, self.rules):
            places: dict[tuple[str, int], list[int]] = {}
            for sample in batch:
                places.setdefault((sample.job, sample.step), []).append(sample.place)
            passes.append([whole[key].part(found) for key, found in places.items()])
        return passes
