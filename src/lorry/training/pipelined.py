"""Rounds in a pipeline: each process runs a stage of the base, with micro-batches of several jobs in flight.

Stages work in the order "one forward, one backward" (1F1B) through the planner's micro-batches. Micro-batches of one
job's successive steps are as many places apart as there are stages, so a step is done before the next one begins, while
those of other jobs fill the pipeline.

The schedules of ``torch.distributed.pipelining`` want micro-batches of one shape and one optimizer step after all of
them; here their lengths differ, and each job steps when its own are through, so the loop is ours and torch's
point-to-point operations carry the tensors.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lorry.core.errors import OptionError
from lorry.core.life.api import auxiliary_loss
from lorry.core.method.start import mix_seed
from lorry.core.options import check_options, from_options, option

from .evaluate import evaluate
from .hooks import Dynamic
from .joint import Base, Share, forward, loss_of
from .pass_planner import PassPlanner
from .planning.simulation import one_forward_one_backward
from .processes import Processes
from .rounds import Done, Rounds, parameters_of
from .run import Run
from .sharding import quantised_site
from .split_pass import refuse_losses_over_rows
from .stages import Stages
from .task import Batch, Tally


@dataclass(frozen=True)
class Pipeline:
    """How the base lies in a pipeline."""

    stages: int = option(2, "Stages that the base's blocks are cut into, one for each process.", at_least=2)

    def __post_init__(self) -> None:
        """Check every option against its declared range."""
        check_options(self)


def pipeline_for(value: Any, processes: Processes) -> Pipeline | None:
    """Return a pipeline from itself or from ``{stages: number}``; None where there is none.

    Raises
    ------
    OptionError
        A wrong option, or another number of processes than of stages.
    """
    if value is None:
        return None
    made = value if isinstance(value, Pipeline) else from_options(Pipeline, value)
    if made.stages != processes.size:
        raise OptionError(
            f"A pipeline of {made.stages} stages needs as many processes, found {processes.size}. Start it with "
            f"torchrun --nproc-per-node {made.stages} -m lorry train ..., or set stages to the number of processes."
        )
    return made


@dataclass
class _Flight:
    """A micro-batch between its forward and its backward pass."""

    arrived: Tensor | None
    left: Tensor


class PipelinedRounds(Rounds):
    """Micro-batches one after another through the stages of a pipeline, of which this process is one.

    Parameters
    ----------
    base
        The whole model with its adapters; weights of other stages are let go.
    planner
        Of the micro-batches, for as many stages.
    processes
        One for each stage.
    runs
        All jobs.

    Raises
    ------
    OptionError
        A job or a model that cannot go through a pipeline.
    """

    def __init__(self, base: Base, planner: PassPlanner, processes: Processes, runs: Sequence[Run]) -> None:
        super().__init__(base, planner, processes)
        _check(runs)
        self.stage = processes.rank
        self.stages = Stages(base.model, processes.size)
        self.stages.keep(self.stage, [p for run in runs for p in parameters_of(run)])
        if processes.device is not None:
            base.model.to(processes.device)
        self._sent: list[tuple[dist.Work, Tensor]] = []
        self._due: dict[str, list[tuple[Any, Tensor]]] = {}

    def steps_of(self, run: Run, most: int) -> int:
        """Return how many steps of a job may be in a round: an evaluation waits for an empty pipeline."""
        every = run.job.eval_every
        return min(most, every - run.progress.step % every) if every else most

    def __call__(self, runs: Mapping[str, Run], tick: int) -> Iterator[Done]:
        """Carry out a round; yields what its steps gave once the pipeline is empty."""
        passes = self.planned(runs)
        flights: dict[int, _Flight] = {}
        done: list[Done] = []
        for place, backward in one_forward_one_backward(len(passes), self.stages.count - self.stage):
            group = passes[place]
            if not group:
                continue
            if backward:
                self._back(flights.pop(place))
                for share in group:
                    self._take(runs[share.name], share)
            else:
                done += self._finish(runs, [share.name for share in group])
                flights[place] = self._forth(group, mix_seed("base", tick, place))
        done += self._finish(runs, list(self._due))
        self._all_sent()
        yield from done

    def evaluate(self, runs: Sequence[Run], ratio: float | None, tokens: int | None) -> dict[str, dict[str, float]]:
        """Return the metrics of jobs, which the last stage works out."""
        found = evaluate(self.base, runs, ratio, tokens, self._tallies)
        self._all_sent()
        return dict(self.processes.told(found, self.stages.count - 1))

    # -- passes through this stage

    def _forth(self, shares: Sequence[Share], seed: int) -> _Flight:
        """Run the forward pass of this stage, and in the last one the losses; send on what leaves."""
        if self.base.base_dropout:
            torch.manual_seed(mix_seed(seed, "stage", self.stage) % 2**63)
        arrived: list[Tensor | None] = []

        def run(batch: Batch) -> Tensor:
            arrived.append(self._arrived(batch, training=True))
            return self._through(shares[0], batch, arrived[0])

        losses, out = [], None
        with forward(self.base, shares, {s.name: mix_seed(s.seed, "stage", self.stage) for s in shares}, run) as found:
            refuse_losses_over_rows(self.base.model, shares, found)
            for share, (out, targets) in zip(shares, found.parts, strict=True):
                if not self.stages.last(self.stage):
                    break
                total, shown = loss_of(self.base.model, share, out, targets)
                penalty = auxiliary_loss(self.base.model, share.name)
                share.loss, share.penalty = float(shown), 0.0 if penalty is None else float(penalty)
                value = total * share.weight if penalty is None else total * share.weight + penalty * share.auxiliary
                # one that is not finite fails its job when the step is done, and spoils no other
                losses += [value] if torch.isfinite(value) else []
            left = found.whole
        if self.stages.last(self.stage):
            left = torch.stack(losses).sum() if losses else torch.zeros(())
        else:
            self._send(left.detach(), self.stage + 1)
        return _Flight(arrived[0], left)

    def _back(self, flight: _Flight) -> None:
        """Run the backward pass of this stage, and send back the gradient of what had arrived."""
        left, gradient = flight.left, None
        if not self.stages.last(self.stage):
            gradient = torch.empty_like(left)
            dist.recv(gradient, self.stage + 1)
        if left.requires_grad:
            left.backward(gradient)
        if flight.arrived is not None:
            found = flight.arrived.grad
            self._send(torch.zeros_like(flight.arrived) if found is None else found, self.stage - 1)

    def _through(self, share: Share, batch: Batch, arrived: Tensor | None) -> Tensor:
        setting = self.base.setting
        here = replace(batch, inputs=self.stages.inputs(self.stage, batch.inputs, arrived))
        out: Tensor | None = None
        with self.stages.only(self.stage, arrived) as left:
            out = share.task.forward(setting, here)
        found = left[0] if left else out
        assert found is not None
        return found

    def _arrived(self, batch: Batch, training: bool) -> Tensor | None:
        """Return what the stage before sent of a batch; None in the first."""
        if not self.stage:
            return None
        ids: Tensor = batch.inputs["input_ids"]
        hidden = torch.empty(*ids.shape, self.stages.width, dtype=self.stages.dtype, device=ids.device)
        dist.recv(hidden, self.stage - 1)
        return hidden.requires_grad_(training)

    def _tallies(self, base: Base, shares: Sequence[Share]) -> list[Tally]:
        """Return the evaluation sums of shares in the last stage, and nothing in the others."""

        def run(batch: Batch) -> Tensor:
            return self._through(shares[0], batch, self._arrived(batch, training=False))

        with torch.no_grad(), forward(base, shares, None, run) as found:
            if not self.stages.last(self.stage):
                self._send(found.whole, self.stage + 1)
                return []
            return [share.task.tally(*pair) for share, pair in zip(shares, found.parts, strict=True)]

    def _send(self, tensor: Tensor, to: int) -> None:
        """Send without waiting; the tensor stays until it has gone."""
        self._sent = [(work, kept) for work, kept in self._sent if not work.is_completed()]
        tensor = tensor.contiguous()
        work = dist.isend(tensor, to)
        assert work is not None
        self._sent.append((work, tensor))

    def _all_sent(self) -> None:
        for work, _ in self._sent:
            work.wait()
        self._sent.clear()

    # -- steps

    def _take(self, run: Run, share: Share) -> None:
        """Count a share whose backward pass is done; a complete step's gradients begin to be summed over the stages."""
        if not run.running:
            return
        run.open_step()
        if not run.take(share):
            return
        parameters = parameters_of(run)
        for p in parameters:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        numbers = torch.tensor([run.progress.loss, run.progress.penalty], dtype=torch.float64)
        flats = [torch.cat([p.grad.flatten() for p in alike]) for alike in _alike(parameters)]
        self._due[run.name] = [(dist.all_reduce(flat, async_op=True), flat) for flat in (numbers, *flats)]

    def _finish(self, runs: Mapping[str, Run], names: Sequence[str]) -> list[Done]:
        """Wait for the sums of complete steps, and let the optimizers step."""
        done: list[Done] = []
        for name in dict.fromkeys(names):
            if name not in self._due:
                continue
            run, sums = runs[name], self._due.pop(name)
            for work, _ in sums:
                work.wait()
            if not run.running:
                continue
            p = run.progress
            p.loss, p.penalty = sums[0][1].tolist()
            for alike, (_, flat) in zip(_alike(parameters_of(run)), sums[1:], strict=True):
                for parameter, part in zip(alike, flat.split([q.numel() for q in alike]), strict=True):
                    parameter.grad = part.view_as(parameter).clone()
            total = p.loss + p.penalty
            if total != total or total in (float("inf"), float("-inf")):
                run.fail(f"at step {p.step + 1}: the loss became {total}")
                continue
            done.append({name: run.finish_step()})
        return done


def _alike(parameters: Sequence[Any]) -> list[list[Any]]:
    """Return parameters by dtype, in the same order in every process."""
    return [[p for p in parameters if p.dtype == dtype] for dtype in dict.fromkeys(p.dtype for p in parameters)]


def _check(runs: Sequence[Run]) -> None:
    other = quantised_site(runs)
    if other is not None:
        raise OptionError(
            f"The weight of '{other.path}' is a {type(other.stored).__name__} of {other.stored.dtype}, and quantised "
            "weights cannot go through a pipeline. Leave pipeline out and set shard: false, or load the base with "
            "dtype: bfloat16."
        )
    for run in runs:
        for dynamic in run.acting.dynamics:
            around = type(dynamic).around_pass is not Dynamic.around_pass
            if around or dynamic.reads_base:
                raise OptionError(
                    f"Job '{run.name}' cannot go through a pipeline: the dynamics '{dynamic.name}' act "
                    f"{'around whole passes' if around else 'on weights of the base'}, and a process sees a stage. "
                    "Leave pipeline out, which splits the rows of passes instead."
                )
