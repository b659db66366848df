"""Fleets: jobs on one frozen base, trained together, each with the result that it would have alone."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lorry.core.errors import LorryError, OptionError
from lorry.core.life.adapter import Adapter
from lorry.core.life.api import context
from lorry.core.life.calibrate import calibrate, needs_calibration
from lorry.core.life.state import open_state
from lorry.core.method.start import mix_seed

from . import checkpoint
from .attaching import attach_job, detach_job
from .batches import BatchPlan
from .data_errors import DataError
from .folder_lock import locked
from .jobs import Job, jobs_from
from .joint import Base
from .loggers import Logs, loggers_from
from .pass_planner import PassPlanner, planner_from
from .pipelined import PipelinedRounds, pipeline_for
from .prepare import prepare
from .processes import Processes
from .progress import Bars
from .report import VERSION, MetricsFile, draw_curves, job_report, print_table, read_metrics
from .rounds import Done, Rounds, parameters_of
from .run import DONE, INTERRUPTED, Run
from .sharding import check_splittable, place_base
from .starts import apply_start
from .task import Prepared, Setting


@dataclass(frozen=True)
class FleetResult:
    """What a fleet made.

    Attributes
    ----------
    report
        As in ``report.json``.
    adapters
        By job, on the model, not active; none for a job that failed before it began.
    """

    report: dict[str, Any]
    adapters: dict[str, Adapter]

    def __getitem__(self, name: str) -> dict[str, Any]:
        """The report of one job."""
        return next(job for job in self.report["jobs"] if job["name"] == name)

    @property
    def ok(self) -> bool:
        """Whether no job failed."""
        return not any(job["status"].startswith("failed") for job in self.report["jobs"])


class Fleet:
    """Jobs on one frozen base; one job is a fleet of one.

    In a joint pass every unfinished job contributes one micro-batch, unless another `planner` is asked for. The rows of
    jobs whose tasks are of one family go through the base once, each with its own job's adapter; each job then has its
    own loss, clipping, optimizer and schedule. Padding, dropout and normalisation of a job do not depend on the others.

    Parameters
    ----------
    model
        The base; its weights do not change.
    tokenizer
        A Hugging Face tokenizer or processor; None if all jobs bring examples that are tensors already.
    jobs
        Jobs, or mappings with the fields of `Job`.
    output
        Folder for adapters, metrics, checkpoints and the report.
    checkpoint_every
        Joint passes (rounds of the planner) between checkpoints; 0 writes one at the end alone.
    keep_checkpoints
        How many of them stay.
    resume
        Take up the newest checkpoint in `output`, if there is one.
    overwrite
        Allow an output folder that holds another run; its checkpoints are removed.
    progress
        Show bars and the table; None does on a terminal.
    console
        A rich console to show them on.
    max_pad_ratio
        Most tokens of a pass, padding included, as a multiple of what the jobs would have
        alone; what is longer runs in a pass of its own. None joins all.
    max_tokens
        Most tokens of a pass, padding included, to bound memory; one micro-batch may have more. For other tasks than
        text, what their `Task.cost` counts.
    base_dropout
        Let the base's own dropout be on in training. Results then depend on the company.
    loggers
        Where metrics go besides ``metrics.jsonl``: ``tensorboard``, ``wandb``, ``{logger: name, **options}``.
    planner
        How examples are put into passes: a name of `lorry.training.pass_planner.PLANNERS`, ``{planner: name,
        **options}`` or a `PassPlanner`; None is ``joined``, with `max_pad_ratio` and `max_tokens`.
    max_memory
        Bytes that training may take, by `lorry.training.estimate`, weights included: the planner makes its passes
        small enough. For jobs that learn from text.
    processes
        What this process is among those that train together (`lorry.training.processes.join`); each makes the same
        fleet, runs a part of the rows of every pass, and the first one writes.
    pipeline
        ``{stages: 2}`` cuts the base into stages, one for each process, in place of splitting the rows.
    shard
        Spread the base's weights over several processes (FSDP2); without it each keeps them whole.

    Raises
    ------
    LorryError
        Options or targets that do not fit. The model is as it was then.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        jobs: Sequence[Job | Mapping[str, Any]],
        output: str | Path,
        *,
        checkpoint_every: int = 0,
        keep_checkpoints: int = 2,
        resume: bool = False,
        overwrite: bool = False,
        progress: bool | None = None,
        console: Any = None,
        max_pad_ratio: float | None = 2.0,
        max_tokens: int | None = None,
        base_dropout: bool = False,
        loggers: Any = None,
        planner: Any = None,
        max_memory: int | None = None,
        processes: Processes | None = None,
        shard: bool = True,
        pipeline: Any = None,
    ) -> None:
        if checkpoint_every < 0 or keep_checkpoints < 1:
            raise OptionError("checkpoint_every must be at least 0 and keep_checkpoints at least 1.")
        if max_pad_ratio is not None and max_pad_ratio < 1:
            raise OptionError(f"max_pad_ratio must be at least 1, found {max_pad_ratio}.")
        self.jobs = jobs_from(jobs)
        self.loggers = loggers_from(loggers)
        self.output = Path(output)
        self.model = model
        self.checkpoint_every, self.keep = checkpoint_every, keep_checkpoints
        self.max_pad_ratio, self.max_tokens = max_pad_ratio, max_tokens
        self.planner: PassPlanner = planner_from(planner, max_pad_ratio, max_tokens)
        if max_memory is not None:
            self.planner = self.planner.within(model, self.jobs, max_memory)
        self.processes, self.shard = processes or Processes(), shard
        self.pipeline = pipeline_for(pipeline, self.processes)
        if self.pipeline is not None:
            self.planner = self.planner.in_stages(self.pipeline.stages)
        self.show, self.console = progress if self.processes.first else False, console
        self.base = Base(Setting(model, tokenizer), base_dropout)
        self.rounds = Rounds(self.base, self.planner, self.processes)
        self.tick = 0
        self.runs = [Run(job) for job in self.jobs]
        self._metrics: dict[str, MetricsFile] = {}
        self._logs: dict[str, Logs] = {}
        self._stop, self._clock = False, 0.0
        self._begin()
        try:
            with locked(self.output):
                self._open(resume, overwrite)
        except BaseException:
            self._detach()
            raise

    # -- start

    def _begin(self) -> None:
        """Attach all adapters, and read all data; a job with bad data fails here, alone."""
        try:
            for run in self.runs:
                run.adapter = attach_job(self.model, run.job)
        except BaseException:
            self._detach()
            raise
        for run in self.runs:
            assert run.adapter is not None
            try:
                prepared = prepare(run.job, self.base.setting)
            except (DataError, OSError) as error:
                detach_job(run.adapter)
                run.adapter = None
                run.fail(str(error))
                continue
            try:
                self._calibrate(run, prepared)
                run.begin(run.adapter, prepared, self.base.setting)
            except LorryError:
                self._detach()
                raise
        try:
            self._check_ahead()
            running = [run for run in self.runs if run.running]
            self.planner.check(running, self.base.setting)
            if self.processes.several:
                self.rounds = self._spread(running)
        except LorryError:
            self._detach()
            raise

    def _spread(self, runs: Sequence[Run]) -> Rounds:
        """Put the base where several processes have it: in stages of a pipeline, in parts, or whole in each."""
        if self.pipeline is not None:
            return PipelinedRounds(self.base, self.planner, self.processes, runs)
        check_splittable(runs, self.shard)
        place_base(self.model, [run.adapter for run in runs if run.adapter], self.processes, self.shard)
        return self.rounds

    def _check_ahead(self) -> None:
        """Refuse to plan steps ahead for jobs whose examples depend on evaluations."""
        wrong = [run.name for run in self.runs if run.acting.by_task]
        if wrong and self.planner.steps_ahead:
            raise OptionError(
                f"Job '{wrong[0]}' drops tasks as evaluations say, and the planner '{self.planner.name}' plans several "
                "steps before they are known; use the planner 'joined'."
            )

    def _calibrate(self, run: Run, prepared: Prepared) -> None:
        """Show the first examples to a method or a start that wants to see some; the same ones at a resumed run."""
        assert run.adapter is not None
        job, train = run.job, prepared.train
        plan = BatchPlan(examples=len(train), batch_size=job.batch_size, seed=job.seed)
        order = plan.epoch(0)[: job.calibration]
        loss = self._calibration_loss(job, prepared)
        if needs_calibration(run.adapter):
            calibrate(run.adapter, order, loss, again=True)  # attached just now
        start = job.make_start()
        if start is not None:
            apply_start(start, run.adapter, order, loss, job.seed)

    def _calibration_loss(self, job: Job, prepared: Prepared) -> Callable[[nn.Module, Sequence[int]], torch.Tensor]:
        task, setting = prepared.task, self.base.setting

        def loss(model: nn.Module, batch: Sequence[int]) -> torch.Tensor:
            generator = torch.Generator().manual_seed(mix_seed(job.seed, "calibrate", *batch))
            examples = task.draw(prepared.train.take(batch), generator, setting, job.name)
            made = task.collate(setting, examples)
            with context(model, **made.facts):
                outputs = task.forward(setting, made)
            total, count = task.loss(prepared.own(outputs), made.targets)
            return total / count

        return loss

    def _detach(self) -> None:
        for run in self.runs:
            if run.adapter is not None:
                detach_job(run.adapter)
                run.adapter = None

    def _open(self, resume: bool, overwrite: bool) -> None:
        """Open the output folder: take up a checkpoint, or start anew; what a run that was killed left half written
        goes.
        """
        folder, first = self.output / "checkpoints", self.processes.first
        if first:
            checkpoint.clear_drafts(folder)
        latest = checkpoint.latest(folder)
        there = latest is not None or (self.output / "report.json").exists()
        name, there = self.processes.told([None if latest is None else latest.name, there])
        path = folder / name if resume and name else None
        if there and not resume and not overwrite:
            raise OptionError(
                f"{self.output} holds a run already; take it up again (resume), replace it (overwrite), or "
                "choose another folder."
            )
        offsets: dict[str, int] = {}
        if path is not None:
            state = checkpoint.read(path)
            for run in self.runs:
                if run.name in state["jobs"]:
                    saved = state["jobs"][run.name]
                    checkpoint.restore(path, run, saved)
                    offsets[run.name] = saved["offset"]
                    self.processes.forget(parameters_of(run))
            self.tick = state["tick"]
        elif overwrite and first and folder.is_dir():
            checkpoint.clear(folder)
        for run in self.runs if first else ():
            folder = self.output / run.name
            self._logs[run.name] = Logs(self.loggers, folder, run.name, run.job.to_dict(), run.progress.step)
            self._metrics[run.name] = MetricsFile(folder / "metrics.jsonl", offsets.get(run.name, 0))

    def _log(self, name: str, row: Mapping[str, Any]) -> None:
        if self.processes.first:
            self._metrics[name].write(row)
            self._logs[name].write(row)

    # -- run

    def train(self) -> FleetResult:
        """Train all jobs to their ends.

        Returns
        -------
        FleetResult
            The report, and the adapters on the model (not active).

        Raises
        ------
        KeyboardInterrupt
            After Ctrl-C or SIGTERM; a checkpoint and a report were written first.
        """
        begun = time.perf_counter()
        active = open_state(self.model).active
        with (
            locked(self.output),
            Bars(self.runs, self.show, self.console) as bars,
            self._interruptible(),
            self.base.mode(training=True),
        ):
            self._evaluate([r for r in self.runs if r.running and not r.progress.evaluations])
            self._finish([r for r in self.runs if not r.running or r.progress.step >= r.total])
            while not self._stop and any(run.running for run in self.runs):
                self._tick()
                bars.update()
        if self._stop:
            for run in self.runs:
                run.progress.status = INTERRUPTED if run.running else run.progress.status
        open_state(self.model).active = active
        report = self._report(time.perf_counter() - begun)
        if self._stop:
            raise KeyboardInterrupt(
                f"stopped; the checkpoint is in {self.output / 'checkpoints'}, resume goes on from it"
            )
        return FleetResult(report, {r.name: r.adapter for r in self.runs if r.adapter is not None})

    def _tick(self) -> None:
        """One round of the planner: its passes, the optimizer steps that they complete, and what follows from them."""
        self._clock = time.perf_counter()
        tried = [run for run in self.runs if run.running]
        for run in tried:
            run.open_step()
        runs = {run.name: run for run in tried if run.running}
        for done in self.rounds(runs, self.tick):
            self._note(runs, done)
        self.tick += 1
        counted = [count for run in self.runs for count in (run.progress.step, int(run.running))]
        self._stop = self.processes.in_step(self._stop, *counted)
        self._finish([run for run in tried if not run.running or run.progress.step >= run.total])
        over = not any(run.running for run in self.runs)
        if self._stop or over or (self.checkpoint_every and self.tick % self.checkpoint_every == 0):
            self.save_checkpoint()

    def _note(self, runs: Mapping[str, Run], done: Done) -> None:
        """Write down the steps that a pass completed, and evaluate where it is time to."""
        now = time.perf_counter()
        for run in runs.values():
            run.progress.seconds += now - self._clock
            row = done.get(run.name)
            if row is not None:
                self._log(run.name, {**row, "seconds": round(run.progress.seconds, 4)})
        self._clock = now
        self._evaluate([runs[name] for name, row in done.items() if row and self._due(runs[name], row["step"])])

    @staticmethod
    def _due(run: Run, step: int) -> bool:
        every = run.job.eval_every
        return run.running and (step >= run.total or bool(every and step % every == 0))

    def _evaluate(self, runs: Sequence[Run]) -> None:
        """Evaluate jobs, write the results, and let patience judge."""
        runs = [r for r in runs if r.prepared is not None and r.prepared.evaluation is not None]
        if not runs:
            return
        for name, metrics in self.rounds.evaluate(runs, self.max_pad_ratio, self.max_tokens).items():
            run = next(r for r in runs if r.name == name)
            run.judge(metrics)
            run.evaluated(metrics)
            self._log(name, {"step": run.progress.step, **{f"eval_{k}": v for k, v in metrics.items()}})

    def _finish(self, runs: Sequence[Run]) -> None:
        """Close jobs that are at their end: best tensors back, adapter saved, gradients let go."""
        for run in runs:
            if run.running:
                run.progress.status = DONE
            if run.failed or run.adapter is None:
                continue
            if not run.progress.closed and run.restore_best():
                metrics = self.rounds.evaluate([run], self.max_pad_ratio, self.max_tokens)[run.name]
                run.progress.evaluations.append({"step": run.progress.best_step, **metrics})
            run.progress.closed = True
            run.release()
            run.adapter.metadata["training"] = _facts(run)
            if run.path is None:
                run.path = str(self.output / run.name / "adapter")
                if self.processes.first:
                    run.adapter.save(run.path)

    def save_checkpoint(self) -> Path:
        """Write a checkpoint now; returns its folder."""
        if self.processes.several:
            self.processes.settle([p for run in self.runs if run.running for p in parameters_of(run)])
        if not self.processes.first:
            return self.output / "checkpoints" / f"{self.tick:08d}"
        offsets = {name: file.offset for name, file in self._metrics.items()}
        return checkpoint.save(self.output / "checkpoints", self.tick, self.runs, offsets, self.keep)

    @contextmanager
    def _interruptible(self) -> Iterator[None]:
        """Let Ctrl-C and SIGTERM end the run after the pass under way; a second one ends it at once."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def stop(number: int, frame: Any) -> None:
            if self._stop:
                raise KeyboardInterrupt
            self._stop = True

        before = {s: signal.signal(s, stop) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    # -- end

    def _report(self, seconds: float) -> dict[str, Any]:
        """Write the report and return it; the other processes are told what the first has."""
        return dict(self.processes.told(self._written_report(seconds) if self.processes.first else None))

    def _written_report(self, seconds: float) -> dict[str, Any]:
        for file in self._metrics.values():
            file.close()
        for log in self._logs.values():
            log.close()
        jobs = [job_report(run, None if run.path is None else Path(run.path)) for run in self.runs]
        base = open_state(self.model).base_name
        report = {
            "version": VERSION,
            "base": base,
            "passes": self.tick,
            "seconds": round(seconds, 3),
            "jobs": jobs,
        }
        curves = self.output / "losses.png"
        metrics = {run.name: read_metrics(self.output / run.name / "metrics.jsonl") for run in self.runs}
        report["curves"] = str(curves) if draw_curves(metrics, curves) else None
        checkpoint.write_json(self.output / "report.json", report)
        if self._shown():
            print_table(report, self.console)
        return report

    def _shown(self) -> bool:
        if self.show is not None:
            return self.show
        from rich.console import Console

        return bool((self.console or Console(stderr=True)).is_terminal)


def train(
    model: nn.Module,
    tokenizer: Any,
    jobs: Sequence[Job | Mapping[str, Any]] | Job,
    output: str | Path,
    **options: Any,
) -> FleetResult:
    """Train one or several jobs on a base; see `Fleet` for the options."""
    return Fleet(model, tokenizer, [jobs] if isinstance(jobs, Job) else jobs, output, **options).train()


def _facts(run: Run) -> dict[str, Any]:
    """What the adapter's metadata say about its training."""
    p, job = run.progress, run.job.to_dict()
    made = run.prepared
    facts = {
        "job": job,
        "steps": p.step,
        run.unit: p.size_seen,
        "last_loss": p.last_loss,
        "torch": torch.__version__,
    }
    if made is not None and made.labels is not None:
        facts["labels"] = list(made.labels)
    if p.evaluations:
        facts["eval"] = {"start": p.evaluations[0], "end": p.evaluations[-1]}
    return facts
