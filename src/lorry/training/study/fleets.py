"""A part of a study's runs, trained side by side as one fleet."""

from __future__ import annotations

import dataclasses
import math
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lorry.core.errors import LorryError, OptionError, near_misses
from lorry.core.life.api import adapters
from lorry.training.evaluate import evaluate
from lorry.training.fleet import Fleet, FleetResult
from lorry.training.jobs import Job
from lorry.training.pass_planner import planner_from
from lorry.training.prepare import prepare
from lorry.training.report import read_metrics
from lorry.training.run import Run
from lorry.training.task import Examples, Setting

from .options import Cell, Study
from .records import DIVERGED, DONE, FAILED, Record, Timing

#: How the engine says that a loss or a gradient is not finite any more.
_NOT_FINITE = re.compile(r"became (nan|-?inf)\b")
#: Told how many steps were done of how many.
Said = Callable[[int, int], None]


def _silent(done: int, planned: int) -> None:
    return


class WatchedFleet(Fleet):
    """A fleet that stops jobs which diverge, and says how far it is.

    Parameters
    ----------
    most
        Multiple of the start's loss above which a job has diverged; None lets it go on.
    said
        Called after each round.
    """

    def __init__(self, *arguments: Any, most: float | None, said: Said, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.most, self.said = most, said

    def _tick(self) -> None:
        super()._tick()
        for run in self.runs:
            reason = too_far(run, self.most) if run.running else None
            if reason is not None:
                run.fail(reason)
        ended = sum(run.progress.step if run.running else run.total for run in self.runs)
        self.said(ended, sum(run.total for run in self.runs))


def too_far(run: Run, most: float | None) -> str | None:
    """Return why a run has diverged by the loss of its last step; None if it has not."""
    p = run.progress
    held = p.evaluations[0]["loss"] if p.evaluations else p.first_loss
    if most is None or held is None or p.last_loss is None:
        return None
    start = max(held, p.first_loss or 0.0)
    if start <= 0 or p.last_loss <= most * start:
        return None
    return f"at step {p.step}: the loss {p.last_loss:.4g} is more than {most:g} times that of the start, {start:.4g}"


class Bench:
    """A base with a study's examples on it, made once.

    Parameters
    ----------
    study
        What is run.
    model, tokenizer
        The base.
    """

    def __init__(self, study: Study, model: nn.Module, tokenizer: Any) -> None:
        self.study, self.model, self.tokenizer = study, model, tokenizer
        self.setting = Setting(model, tokenizer)
        self.measure, _ = study.measure()
        self._ready: dict[str, dict[str, Any]] = {}
        self._test: dict[str, Examples[Any]] = {}

    def train(self, cells: Sequence[Cell], folder: Path | None = None, said: Said = _silent) -> list[Record]:
        """Train runs side by side, and return what they came to.

        Parameters
        ----------
        cells
            Runs of one study.
        folder
            Where a fleet that is stopped leaves its checkpoint, and takes it up again; a temporary one if not given.
        said
            Called after each round with the steps that are done, and all of them.

        Raises
        ------
        LorryError
            What was asked for cannot be done, such as targets that the base does not have.
        KeyboardInterrupt
            After Ctrl-C; a checkpoint was written first.
        """
        jobs = [self.job(cell) for cell in cells]
        if len(cells) > 1 and not self._fits(jobs):
            return self._halves(cells, folder, said)
        try:
            with _place(folder) as place, self._alone():
                fleet = self._fleet(jobs, place, said)
                result = fleet.train()
                return [self._record(cell, run, result, fleet) for cell, run in zip(cells, fleet.runs, strict=True)]
        except LorryError:
            raise
        except (RuntimeError, ValueError, ArithmeticError) as error:  # of one job, or too little memory for all
            if folder is not None:
                shutil.rmtree(folder, ignore_errors=True)
            if len(cells) > 1:
                return self._halves(cells, folder, said)
            return [_failed(cells[0], f"{type(error).__name__}: {error}")]

    def _halves(self, cells: Sequence[Cell], folder: Path | None, said: Said) -> list[Record]:
        middle = len(cells) // 2
        parts = ((cells[:middle], "a"), (cells[middle:], "b"))
        return [
            record
            for part, name in parts
            for record in self.train(part, None if folder is None else folder.with_name(f"{folder.name}{name}"), said)
        ]

    def time(self, cell: Cell) -> Timing:
        """Train a run alone for a few steps, and return the shortest of them but for the first."""
        changes: dict[str, Any] = {
            "steps": self.study.timed_steps + 1,
            "epochs": None,
            "eval_data": None,
            "hold_out": 0.0,
        }
        job = dataclasses.replace(self.job(cell), **changes, eval_every=0, patience=None, keep_best=False)
        with tempfile.TemporaryDirectory() as place, self._alone():
            fleet = Fleet(self.model, self.tokenizer, [job], place, progress=False, max_tokens=self.study.max_tokens)
            fleet.train()
            rows = read_metrics(Path(place) / job.name / "metrics.jsonl")
        marks = [row["seconds"] for row in rows if "seconds" in row]
        spans = [b - a for a, b in zip(marks, marks[1:], strict=False)]
        return Timing(cell.variant, cell.rank, cell.batch_size, min(spans, default=None))

    def job(self, cell: Cell, **changes: Any) -> Job:
        """Return the job of a run with examples in the place of its data, encoded once for all that need the same."""
        job, key = self.study.job_of(cell), self._key(cell)
        if key not in self._ready:
            none: dict[str, Any] = {
                "eval_data": None,
                "hold_out": 0.0,
                "eval_every": 0,
                "patience": None,
                "keep_best": False,
            }
            plain = dataclasses.replace(job, **none)
            made = prepare(plain, self.setting)
            ready: dict[str, Any] = {"data": made.train, "labels": made.labels, "task_ids": None}
            others = {"eval_data": job.eval_data, "test": self.study.test}
            for name, data in others.items():
                if data is not None:
                    ready[name] = prepare(dataclasses.replace(plain, data=data, labels=made.labels), self.setting).train
            if "test" in ready:
                self._test[key] = ready.pop("test")
            self._ready[key] = ready
        return dataclasses.replace(job, **self._ready[key], **changes)

    def _key(self, cell: Cell) -> str:
        """Return the same text for runs whose examples are the same."""
        job = self.study.job_of(cell)
        return repr((job.make_objective(), job.labels))

    def _fleet(self, jobs: Sequence[Job], place: Path, said: Said) -> WatchedFleet:
        study = self.study
        return WatchedFleet(
            self.model,
            self.tokenizer,
            jobs,
            place,
            most=study.diverged,
            said=said,
            resume=True,
            progress=False,
            checkpoint_every=study.checkpoint_every,
            keep_checkpoints=1,
            max_pad_ratio=study.max_pad_ratio,
            max_tokens=study.max_tokens,
            max_memory=study.max_memory,
        )

    def _fits(self, jobs: Sequence[Job]) -> bool:
        """Whether these jobs side by side fit into the memory that is allowed."""
        if self.study.max_memory is None:
            return True
        try:
            planner_from(None, self.study.max_pad_ratio, self.study.max_tokens).within(
                self.model, jobs, self.study.max_memory
            )
        except OptionError:
            return False
        return True

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Take off the adapters that are attached within, and put torch's randomness back, whatever happens."""
        there = set(adapters(self.model))
        with torch.random.fork_rng(devices=[]):
            try:
                yield
            finally:
                for name, adapter in adapters(self.model).items():
                    if name not in there:
                        adapter.detach()

    def _record(self, cell: Cell, run: Run, result: FleetResult, fleet: Fleet) -> Record:
        said, p = result[cell.name], run.progress
        held = said["eval"] or {}
        facts: dict[str, Any] = {**dataclasses.asdict(cell), "parameters": said["parameters"], "steps": p.step}
        facts["start"] = self._score(held.get("start", {}))
        if run.failed:
            reason = p.status.removeprefix("failed: ")
            diverged = _NOT_FINITE.search(reason) or (too_far(run, self.study.diverged) or "") == reason
            return Record(status=DIVERGED if diverged else FAILED, reason=reason, **facts)
        metrics = {k: v for k, v in held.get("end", {}).items() if k != "step"}
        score, loss = self._score(metrics), metrics.get("loss")
        if score is None or loss is None:
            return Record(status=DIVERGED, reason="the held-out score at the end is not finite", **facts)
        start = held["start"].get("loss")
        if self.study.diverged is not None and start and loss > self.study.diverged * start:
            reason = f"the held-out loss at the end, {loss:.4g}, is more than {self.study.diverged:g} times {start:.4g}"
            return Record(status=DIVERGED, reason=reason, **facts)
        return Record(status=DONE, score=score, metrics=metrics, test=self._tested(cell, run, fleet), **facts)

    def _score(self, metrics: Mapping[str, Any]) -> float | None:
        if metrics and self.measure not in metrics:
            names = [k for k in metrics if k not in ("step", "count")]
            raise OptionError(
                f"The objective has no score '{self.measure}'.{near_misses(self.measure, names)} It has: "
                f"{', '.join(names)}."
            )
        value = metrics.get(self.measure)
        return float(value) if value is not None and math.isfinite(value) else None

    def _tested(self, cell: Cell, run: Run, fleet: Fleet) -> float | None:
        """Return the score of a trained run on data that choose nothing."""
        found = self._test.get(self._key(cell))
        if found is None or run.prepared is None:
            return None
        run.prepared = dataclasses.replace(run.prepared, evaluation=found)
        return self._score(evaluate(fleet.base, [run], self.study.max_pad_ratio, self.study.max_tokens)[run.name])


@contextmanager
def _place(folder: Path | None) -> Iterator[Path]:
    """Give a fleet its folder, which goes when the fleet is done with it, and stays when it was stopped."""
    if folder is None:
        with tempfile.TemporaryDirectory() as place:
            yield Path(place)
        return
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def _failed(cell: Cell, reason: str) -> Record:
    return Record(status=FAILED, reason=reason, **dataclasses.asdict(cell))
