"""A job under way: its adapter, optimizer, place in the data, and what it has measured so far."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lorry.core.life.adapter import Adapter
from lorry.core.life.calibrate import finish_step
from lorry.core.method.start import mix_seed

from .batches import BatchCursor, BatchPlan
from .jobs import Job
from .joint import Share
from .optim import clip_gradients, gradients, make_optimizer, set_rate
from .prepare import Prepared
from .schedule import rate_factor

#: What a job's status may be; a failed one is ``failed: WHY``.
RUNNING, DONE, STOPPED, INTERRUPTED = "running", "done", "stopped early", "interrupted"


@dataclass
class Progress:
    """What a job has done and measured: plain data, kept in checkpoints."""

    status: str = RUNNING
    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    first_loss: float | None = None
    last_loss: float | None = None
    best_loss: float | None = None
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    best_step: int | None = None
    best_value: float | None = None
    worse: int = 0
    closed: bool = False
    # of the step under way
    micro: int = 0
    pending: list[list[int]] = field(default_factory=list)
    size: int = 0
    labels: int = 0
    loss: float = 0.0
    penalty: float = 0.0


class Run:
    """A job on its base.

    Attributes:
        job: what was asked for.
        progress: what was done; see `Progress`.
        adapter, prepared, cursor, optimizer: None for a job that failed before it began.
        best: the tensors of the best evaluation, where the job keeps them.
    """

    def __init__(self, job: Job) -> None:
        self.job = job
        self.progress = Progress()
        self.adapter: Adapter | None = None
        self.prepared: Prepared | None = None
        self.cursor: BatchCursor | None = None
        self.optimizer: torch.optim.Optimizer | None = None
        self.best: dict[str, Tensor] = {}
        self.total = 0
        self.path: str | None = None
        self._records: dict[tuple[str, str], Tensor] = {}

    def begin(self, adapter: Adapter, prepared: Prepared) -> None:
        """Take up the adapter and the data."""
        job = self.job
        self.adapter, self.prepared = adapter, prepared
        epochs = None if job.steps is not None else job.epochs or 1
        plan = BatchPlan(
            rows=len(prepared.train),
            batch_size=job.batch_size,
            seed=job.seed,
            bucket_window=job.bucketing,
            epochs=epochs,
            lengths=tuple(prepared.train.lengths) if job.bucketing else None,
        )
        self.cursor = BatchCursor(plan)
        self.total = job.steps or math.ceil((epochs or 1) * plan.batches_per_epoch / job.accumulation)
        self.optimizer = make_optimizer(job, adapter)

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
        return job.rate * rate_factor(job.schedule, self.progress.step, self.total, job.warmup, job.rate_floor)

    def fail(self, reason: str) -> None:
        """Stop, and forget the gradient of the step under way."""
        self.progress.status = f"failed: {reason}"
        self.release()
        self.optimizer = None

    def release(self) -> None:
        """Give up the gradients; the optimizer stays, since a finished run may be taken up for longer."""
        if self.optimizer is not None:
            self.optimizer.zero_grad(set_to_none=True)
        self._records.clear()

    def share(self) -> Share:
        """The next micro-batch; opens a step where none is under way."""
        assert self.prepared is not None and self.adapter is not None
        p = self.progress
        if not p.pending:
            self._open_step()
        rows = self.prepared.train.take(p.pending[0])
        seed = mix_seed(self.job.seed, "step", p.step, p.micro)
        weight, auxiliary = 1.0 / p.labels, 1.0 / p.size
        made, draws = self.prepared, self.adapter.row_draws
        return Share(self.name, made.objective, rows, made.classes, seed, weight, auxiliary, draws)

    def _open_step(self) -> None:
        """Draw the micro-batches of a step; the last step of the last epoch may have fewer."""
        assert self.prepared is not None and self.cursor is not None
        p = self.progress
        p.pending = []
        for _ in range(self.job.accumulation):
            batch = next(self.cursor, None)
            if batch is None:
                break
            p.pending.append(list(batch))
        p.micro, p.loss, p.penalty, p.size = 0, 0.0, 0.0, len(p.pending)
        p.labels = sum(self.prepared.train[i].label_count for batch in p.pending for i in batch)

    def take(self, share: Share) -> bool:
        """Count a share that went through a pass; returns whether the step's gradient is complete."""
        p = self.progress
        if share.error is not None:
            self.fail(f"at step {p.step + 1}: {share.error}")
            return False
        p.loss += share.loss
        p.penalty += share.penalty / p.size
        p.tokens += sum(len(row) for row in share.rows)
        p.micro += 1
        p.pending.pop(0)
        for key, value in share.records.items():
            self._records[key] = self._records[key] + value if key in self._records else value
        return not p.pending

    def finish_step(self) -> dict[str, Any] | None:
        """Clip, and step the optimizer; returns the step's metrics, or None if the job failed."""
        assert self.optimizer is not None and self.adapter is not None
        p, rate = self.progress, self.rate
        grads = gradients(self.optimizer)
        norm = clip_gradients(grads, self.job.clip)
        loss = p.loss / p.labels
        if not math.isfinite(norm):
            self.fail(f"at step {p.step + 1}: the gradient became {norm} (loss {loss:.4g}, rate {rate:.3g})")
            return None
        set_rate(self.optimizer, rate)
        self.optimizer.step()
        by_site: dict[str, dict[str, Tensor]] = {}
        for (path, name), value in self._records.items():  # summed over the micro-batches of the step
            by_site.setdefault(path, {})[name] = value
        self._records.clear()
        finish_step(self.adapter, p.step + 1, self.total, by_site)
        self.optimizer.zero_grad(set_to_none=True)
        p.step += 1
        p.last_loss = loss
        p.first_loss = loss if p.first_loss is None else p.first_loss
        p.best_loss = loss if p.best_loss is None else min(loss, p.best_loss)
        row = {
            "step": p.step,
            "epoch": round(self.epochs, 6),
            "loss": loss,
            "rate": rate,
            "grad_norm": norm,
            "tokens": p.tokens,
        }
        return {**row, "auxiliary": p.penalty} if p.penalty else row

    @property
    def epochs(self) -> float:
        """Passes over the data so far."""
        assert self.cursor is not None
        return self.cursor.batches_seen / self.cursor.plan.batches_per_epoch

    def judge(self, metrics: dict[str, float]) -> bool:
        """Take an evaluation; returns whether it is the best so far. Says when patience is at an end."""
        assert self.prepared is not None and self.adapter is not None
        p = self.progress
        metric, way = self.prepared.objective.best
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

    def restore_best(self) -> bool:
        """Go back to the tensors of the best evaluation, if they were kept and are not the present ones."""
        if not self.best or self.adapter is None or self.progress.best_step == self.progress.step:
            return False
        with torch.no_grad():
            for name, tensor, _ in self.adapter.named_tensors():
                tensor.copy_(self.best[name])
        return True
