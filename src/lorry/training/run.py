"""A job under way: its adapter, optimizer, place in the data, and what it has measured so far."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lorry.core.errors import LorryError
from lorry.core.life import duties
from lorry.core.life.adapter import Adapter
from lorry.core.life.calibrate import finish_step
from lorry.core.method.base import Method
from lorry.core.method.start import mix_seed

from .batches import BatchCursor, BatchPlan, groups_of
from .groups import ParameterGroups
from .hooks import Acting, Dynamic, Moment
from .jobs import Job
from .joint import Place, Share
from .optim import clip_gradients, gradients, make_optimizer, set_rate
from .row_gradients import RowGradients
from .schedule import Schedule, rate_factor
from .task import Prepared, Setting

#: What a job's status may be; a failed one is ``failed: WHY``.
RUNNING, DONE, STOPPED, INTERRUPTED = "running", "done", "stopped early", "interrupted"


@dataclass
class Progress:
    """What a job has done and measured: plain data, kept in checkpoints."""

    status: str = RUNNING
    step: int = 0
    size_seen: int = 0
    seconds: float = 0.0
    first_loss: float | None = None
    last_loss: float | None = None
    best_loss: float | None = None
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    best_step: int | None = None
    best_value: float | None = None
    worse: int = 0
    closed: bool = False
    # examples of all steps, tasks that are drawn no more, and stages that begin before the next step
    drawn: int = 0
    dropped: list[int] = field(default_factory=list)
    raised: list[str] = field(default_factory=list)
    # of the step under way
    micro: int = 0
    pending: list[list[int]] = field(default_factory=list)
    size: int = 0
    labels: int = 0
    examples: int = 0
    loss: float = 0.0
    penalty: float = 0.0


class Run:
    """A job on its base.

    Attributes
    ----------
    job
        What was asked for.
    progress
        What was done; see `Progress`.
    adapter, prepared, cursor, groups
        None for a job that failed before it began.
    acting
        What acts on its training.
    best
        The tensors of the best evaluation, where the job keeps them.
    methods
        The method at each site when training began; sites may get others on the way.
    total
        Optimizer steps of the whole run.
    """

    def __init__(self, job: Job) -> None:
        self.job = job
        self.progress = Progress()
        self.adapter: Adapter | None = None
        self.prepared: Prepared | None = None
        self.cursor: BatchCursor | None = None
        self.groups: ParameterGroups | None = None
        self.acting = Acting(job.make_dynamics())
        self.schedule: Schedule = job.make_schedule()
        self.methods: dict[str, Method] = {}
        self.best: dict[str, Tensor] = {}
        self.total = 0
        self.path: str | None = None
        self._records: dict[tuple[str, str], Tensor] = {}
        self._rows: RowGradients | None = None

    def begin(self, adapter: Adapter, prepared: Prepared, setting: Setting) -> None:
        """Take up the adapter and the data."""
        job, self._setting = self.job, setting
        self.adapter, self.prepared = adapter, prepared
        epochs = None if job.steps is not None else job.epochs or 1
        plan = BatchPlan(
            examples=len(prepared.train),
            batch_size=job.batch_size,
            seed=job.seed,
            bucket_window=job.bucketing,
            epochs=epochs,
            lengths=tuple(map(prepared.task.cost, prepared.train.examples)) if job.bucketing else None,
            groups=groups_of(list(map(prepared.task.kin, prepared.train.examples))),
        )
        self.cursor = BatchCursor(plan)
        batches = (epochs or 1) * plan.batches_per_epoch
        self.total = job.steps or math.ceil(batches / job.gradient_accumulation_steps)
        self.groups = ParameterGroups(make_optimizer(job, adapter), adapter)
        self.methods = {path: entry.method for path, entry in adapter.entries.items()}
        if self.acting.row_gradients:
            self._rows = RowGradients(adapter)
        duties.attend_all(adapter)

    @property
    def optimizer(self) -> torch.optim.Optimizer | None:
        """The optimizer; None for a job that failed."""
        return None if self.groups is None else self.groups.optimizer

    @property
    def name(self) -> str:
        """The job's name."""
        return self.job.name

    @property
    def running(self) -> bool:
        """Whether it has steps to do."""
        return self.progress.status == RUNNING

    @property
    def failed(self) -> bool:
        """Whether it stopped because something was wrong."""
        return self.progress.status.startswith("failed")

    @property
    def rate(self) -> float:
        """The learning rate of the step under way."""
        job = self.job
        return job.learning_rate * rate_factor(
            self.schedule, self.progress.step, self.total, job.warmup, job.rate_floor
        )

    def fail(self, reason: str) -> None:
        """Stop, and forget the gradient of the step under way."""
        self.progress.status = f"failed: {reason}"
        self.release()
        self.groups = None

    def release(self) -> None:
        """Give up the gradients; the optimizer stays, since a finished run may be taken up for longer."""
        if self.optimizer is not None:
            self.optimizer.zero_grad(set_to_none=True)
        self._records.clear()

    def open_step(self) -> None:
        """Begin the next step where none is under way: draw its micro-batches, and let stages begin.

        The last step of the last epoch may have fewer micro-batches.
        """
        assert self.prepared is not None and self.cursor is not None
        p, train = self.progress, self.prepared.train
        if p.pending:
            return
        p.pending = self._drawn(self.cursor)
        if not p.pending:
            p.status = STOPPED  # tasks that were dropped leave nothing to learn from
            return
        p.micro, p.loss, p.penalty, p.size = 0, 0.0, 0.0, len(p.pending)
        p.labels = sum(self.prepared.task.count(train[i]) for batch in p.pending for i in batch)
        p.examples = sum(map(len, p.pending))
        if p.step == 0:
            self._each(lambda dynamic, at: dynamic.begin(at))
        beginning = [*self.job.stages_at(p.step, self.total), *p.raised]
        p.raised.clear()
        for stage in beginning:
            self._each(lambda dynamic, at, stage=stage: dynamic.at_stage(at, stage))  # type: ignore[misc]

    def share(self) -> Share:
        """Return the next micro-batch of the step that is open."""
        assert self.prepared is not None and self.adapter is not None
        p, made = self.progress, self.prepared
        chosen = p.pending[0]
        generator = torch.Generator().manual_seed(mix_seed(self.job.seed, "draw", p.step, p.micro))
        return Share(
            name=self.name,
            prepared=made,
            examples=made.task.draw(made.train.take(chosen), generator, self._setting, self.name),
            task_ids=made.train.ids(chosen),
            seed=mix_seed(self.job.seed, "step", p.step, p.micro),
            weight=1.0 / p.labels,
            auxiliary=1.0 / p.size,
            draws=self.adapter.row_draws,
            around=self._around if self.acting.dynamics else None,
        )

    def _drawn(self, cursor: BatchCursor) -> list[list[int]]:
        """Return the micro-batches of the step that a cursor comes to next; fewer, or none, at the end of the data."""
        assert self.prepared is not None
        ids, dropped = self.prepared.train.task_ids, set(self.progress.dropped)
        found: list[list[int]] = []
        if ids is not None and dropped.issuperset(ids):
            return found
        while len(found) < self.job.gradient_accumulation_steps:
            batch = next(cursor, None)
            if batch is None:
                break
            # of what a task that was dropped leaves out, nothing else takes the place: that is what is saved
            left = list(batch) if ids is None else [i for i in batch if ids[i] not in dropped]
            if left:
                found.append(left)
        return found

    def ahead(self, steps: int) -> list[Share]:
        """Return what is left of the step that is open and the steps after it as a share each, `steps` in all.

        A planner takes them apart (`Share.part`). Their examples are not drawn anew in each pass.
        """
        assert self.prepared is not None and self.cursor is not None
        p, made, cursor = self.progress, self.prepared, self.cursor.ahead()
        shares = []
        for number in range(min(steps, self.total - p.step)):
            chosen = [i for batch in (self._drawn(cursor) if number else p.pending) for i in batch]
            if not chosen:
                break
            labels = sum(made.task.count(made.train[i]) for i in chosen) if number else p.labels
            shares.append(
                Share(
                    name=self.name,
                    prepared=made,
                    examples=made.train.take(chosen),
                    seed=mix_seed(self.job.seed, "step", p.step + number),
                    weight=1.0 / labels,
                    around=self._around if self.acting.dynamics else None,
                    step=number,
                    chosen=tuple(chosen),
                )
            )
        return shares

    def take(self, share: Share) -> bool:
        """Count a share that went through a pass; returns whether the step's gradient is complete."""
        p = self.progress
        if share.error is not None:
            self.fail(f"at step {p.step + 1}: {share.error}")
            return False
        found = {} if self._rows is None else self._rows.found
        self._each(lambda dynamic, at: dynamic.after_pass(at, found if dynamic.row_gradients else {}), self._facts())
        if not self.running:
            return False
        p.loss += share.loss
        p.penalty += share.penalty * share.auxiliary
        p.size_seen += sum(share.task.cost(e) * share.task.rows_of(e) for e in share.examples)
        p.micro += 1
        if share.chosen is None:
            p.pending.pop(0)
        else:
            left = [i for batch in p.pending for i in batch]
            for i in share.chosen:
                left.remove(i)
            p.pending = [left] if left else []
        for key, value in share.records.items():
            self._records[key] = self._records[key] + value if key in self._records else value
        return not p.pending

    @contextmanager
    def _around(self, place: Place) -> Iterator[None]:
        """Let the dynamics be around a pass, and collect the gradients of its rows for those that want them."""
        with ExitStack() as stack:
            for dynamic in self.acting.dynamics:
                at = self._moment(dynamic, {**self._facts(), "rows": (place.start, place.stop, place.total)})
                stack.enter_context(dynamic.around_pass(at))
            if self._rows is not None:
                stack.enter_context(self._rows.watching(place.start, place.stop, place.total))
            yield

    def _facts(self) -> dict[str, Any]:
        """Return what dynamics are told of the micro-batch under way."""
        assert self.prepared is not None
        p, task, train = self.progress, self.prepared.task, self.prepared.train
        if not self.acting.dynamics:
            return {}
        examples = [train[i] for i in p.pending[0]]
        heights, counts = tuple(map(task.rows_of, examples)), tuple(map(task.count, examples))
        return {"weight": 1.0 / p.labels, "heights": heights, "counts": counts}

    def _moment(self, dynamic: Dynamic, facts: Mapping[str, Any] | None = None) -> Moment:
        assert self.adapter is not None and self.groups is not None
        p, remembered = self.progress, self.acting.remembered(dynamic.name)
        values = (p.step, self.total, p.micro, self.rate, self.job.seed, dynamic.name, remembered, p.examples)
        found = Moment(self.adapter, self.groups, *values, **facts or {})
        found.tasks, found.raised, found.dropped = self.task_names, p.raised, p.dropped
        return found

    @property
    def task_names(self) -> tuple[str, ...]:
        """Names of the tasks of its examples by number; empty where they have none."""
        assert self.prepared is not None
        ids = self.prepared.train.task_ids
        if ids is None:
            return ()
        given = self.job.task_ids
        if isinstance(given, Mapping) and given.get("names") is not None:
            return tuple(map(str, given["names"]))
        return tuple(map(str, range(1 + max(ids))))

    def _each(self, act: Callable[[Dynamic, Moment], None], facts: Mapping[str, Any] | None = None) -> None:
        """Let every dynamic act; one that cannot stops the job."""
        if self.adapter is None:
            return
        shapes = self._shapes() if self.acting.dynamics else {}
        for dynamic in self.acting.dynamics:
            try:
                with torch.no_grad():
                    act(dynamic, self._moment(dynamic, facts))
            except LorryError as error:
                self.fail(f"at step {self.progress.step + 1}: {error}")
                return
        if shapes != (self._shapes() if self.acting.dynamics else {}):
            # tensors of another shape cannot come back, so the best is looked for anew
            self.best = {}
            self.progress.best_value, self.progress.best_step = None, None

    def _shapes(self) -> dict[str, torch.Size]:
        assert self.adapter is not None
        return {name: tensor.shape for name, tensor, _ in self.adapter.named_tensors()}

    def finish_step(self) -> dict[str, Any] | None:
        """Clip, and step the optimizer; returns the step's metrics, or None if the job failed."""
        assert self.optimizer is not None and self.adapter is not None
        p, rate = self.progress, self.rate
        self._each(lambda dynamic, at: dynamic.before_step(at))
        if self.optimizer is None:
            return None
        grads = gradients(self.optimizer)
        norm = clip_gradients(grads, self.job.max_grad_norm)
        loss = p.loss / p.labels
        if not math.isfinite(norm):
            self.fail(f"at step {p.step + 1}: the gradient became {norm} (loss {loss:.4g}, rate {rate:.3g})")
            return None
        set_rate(self.optimizer, rate)
        self._each(lambda dynamic, at: dynamic.after_clipping(at))
        if self.optimizer is None:
            return None
        self.optimizer.step()
        by_site: dict[str, dict[str, Tensor]] = {}
        for (path, name), value in self._records.items():  # summed over the micro-batches of the step
            by_site.setdefault(path, {})[name] = value
        self._records.clear()
        finish_step(self.adapter, p.step + 1, self.total, by_site)
        self._each(lambda dynamic, at: dynamic.after_step(at))
        if self.optimizer is None:
            return None
        self.optimizer.zero_grad(set_to_none=True)
        p.step += 1
        p.drawn += p.examples
        p.last_loss = loss
        p.first_loss = loss if p.first_loss is None else p.first_loss
        p.best_loss = loss if p.best_loss is None else min(loss, p.best_loss)
        row = {
            "step": p.step,
            "epoch": round(self.epochs, 6),
            "loss": loss,
            "rate": rate,
            "grad_norm": norm,
            self.unit: p.size_seen,
        }
        return {**row, "auxiliary": p.penalty} if p.penalty else row

    @property
    def unit(self) -> str:
        """What the size of its data is counted in."""
        return "tokens" if self.prepared is None else self.prepared.task.unit

    @property
    def epochs(self) -> float:
        """Passes over the data so far."""
        assert self.cursor is not None
        return self.cursor.batches_seen / self.cursor.plan.batches_per_epoch

    def judge(self, metrics: dict[str, float]) -> bool:
        """Take an evaluation; returns whether it is the best so far. Says when patience is at an end."""
        assert self.prepared is not None and self.adapter is not None
        p = self.progress
        metric, way = self.prepared.task.best
        value = metrics[metric]
        better = p.best_value is None or (value < p.best_value if way == "min" else value > p.best_value)
        p.evaluations.append({"step": p.step, **metrics})
        if better and math.isfinite(value):
            p.best_value, p.best_step, p.worse = value, p.step, 0
            if self.job.keep_best:
                self.best = {n: t.detach().clone() for n, t, _ in self.adapter.named_tensors()}
        elif p.step:
            p.worse += 1
            if self.job.patience is not None and p.worse >= self.job.patience and self.running:
                p.status = STOPPED
        return better

    def evaluated(self, metrics: Mapping[str, float]) -> None:
        """Let dynamics act on an evaluation."""
        if self.progress.step and self.running:
            self._each(lambda dynamic, at: dynamic.after_evaluation(at, metrics))

    def restore_best(self) -> bool:
        """Go back to the tensors of the best evaluation, if they were kept and are not the present ones."""
        if not self.best or self.adapter is None or self.progress.best_step == self.progress.step:
            return False
        with torch.no_grad():
            for name, tensor, _ in self.adapter.named_tensors():
                tensor.copy_(self.best[name])
        return True
