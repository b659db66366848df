"""``lorry train``: one or several jobs on one frozen base."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

from lorry.cli.arguments import BASE_HELP, names
from lorry.cli.job_flags import job_values, parameters
from lorry.cli.output import note, out, print_json
from lorry.core.errors import OptionError

if TYPE_CHECKING:
    from lorry.cli.run_file import RunFile
    from lorry.training.jobs import Job
    from lorry.training.processes import Processes


def _signature(
    config: Annotated[
        Path | None,
        typer.Argument(
            help="YAML with base, out and jobs (`lorry init` writes one); or give the flags of one job instead."
        ),
    ] = None,
    base: Annotated[str | None, typer.Option("--base", "-b", help=BASE_HELP)] = None,
    out_folder: Annotated[
        str | None, typer.Option("--out", help="Folder for adapters, checkpoints, metrics and the report.")
    ] = None,
    replaced: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="Replace a value of the YAML, e.g. base=DIR, rank=4 (in every job), jobs.NAME.seed=1; repeatable.",
        ),
    ] = None,
    base_dtype: Annotated[
        str | None,
        typer.Option("--base-dtype", help="Dtype of the base in memory: auto, float32, bfloat16, float16."),
    ] = None,
    task: Annotated[
        str | None, typer.Option("--task", help="Head of the base; what the objective needs if not given.")
    ] = None,
    checkpoint_every: Annotated[
        int | None,
        typer.Option("--checkpoint-every", help="Steps between checkpoints; 0 writes one at the end."),
    ] = None,
    planner: Annotated[
        str | None,
        typer.Option(
            "--planner",
            help="How examples are put into passes: joined, lorafusion, or with options as in YAML, e.g. "
            "'{planner: lorafusion, capacity: 8192}'.",
        ),
    ] = None,
    loggers: Annotated[
        list[str] | None, typer.Option("--loggers", help="Also log to tensorboard or wandb; repeatable.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the last checkpoint in the output folder.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a run in the output folder.")] = False,
    find_rate: Annotated[
        bool,
        typer.Option("--find-rate", help="Try several learning rates at once for a few steps and say the best."),
    ] = False,
    show_schema: Annotated[bool, typer.Option("--schema", help="Print the JSON schema of the YAML and stop.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as one JSON document on stdout.")] = False,
) -> None:
    """Declare the flags that are not options of a job."""


#: Exit code of a process that was told to stop, and leaves it to the first to say so.
STOPPED = 130


class TrainCommand(TyperCommand):
    """The command, which knows what the flags of other trainers are called here."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Read the flags; one that is another trainer's is refused with its name here."""
        known = {text for p in self.get_params(ctx) for text in (*p.opts, *p.secondary_opts)}
        for text in args:
            flag = text.partition("=")[0]
            if flag.startswith("--") and flag not in known:
                from lorry.training.short_forms import called_here

                said = called_here(flag[2:].replace("-", "_"))
                if said:
                    raise OptionError(said)
        return super().parse_args(ctx, args)


def train(**flags: Any) -> None:
    """Train one job given by flags, or all jobs of a YAML file at once on one frozen base."""
    own = {name: flags.pop(name) for name in inspect.signature(_signature).parameters}
    if own["show_schema"]:
        from lorry.cli.run_file import schema

        print_json(schema())
        return
    from lorry.training.processes import ProcessError, join

    processes = join()
    try:
        with processes.one_end():
            failed = _train(own, flags, processes)
    except ProcessError as error:
        if error.own:
            raise
        raise typer.Exit(1) from None  # the process that failed says so
    except KeyboardInterrupt:
        if processes.first:
            raise
        raise typer.Exit(STOPPED) from None
    if failed:
        raise typer.Exit(1)


def _train(own: dict[str, Any], flags: dict[str, Any], processes: Processes) -> bool:
    """Train, and print what came out; returns whether a job failed. Of several processes the first alone prints."""
    from lorry.cli.output import err, failure
    from lorry.training.report import print_table

    run = _run_of(own, job_values(flags))
    if own["find_rate"]:
        from lorry.cli.find_rate import advise

        if processes.several:
            raise OptionError("--find-rate tries rates on one process; run it without a launcher.")
        advise(run, *base_and_jobs(run), own["as_json"])
        return False
    report = execute(run, resume=own["resume"], overwrite=own["overwrite"], processes=processes)
    processes.leave()
    failed = any(job["status"].startswith("failed") for job in report["jobs"])
    if not processes.first:
        return failed
    if own["as_json"]:
        print_json(report)
    elif not err().is_terminal:  # on a terminal the fleet has drawn the table below its bars
        print_table(report, out())
    for job in report["jobs"]:
        if job["status"].startswith("failed"):
            failure(f"job '{job['name']}' {job['status']}")
    note(f"report, metrics and curves are in {run.out}")
    return failed


_own = list(inspect.signature(_signature, eval_str=True).parameters.values())
train.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
    [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in _own] + parameters()
)
train.__annotations__ = {p.name: p.annotation for p in train.__signature__.parameters.values()}  # type: ignore[attr-defined]


def _run_of(own: dict[str, Any], job: dict[str, Any]) -> RunFile:
    """Return the run that the command line means: that of the file with some values replaced, or that
    of one job.
    """
    import dataclasses

    from lorry.cli.run_file import RunFile, read_run_file
    from lorry.cli.yaml_text import plain_yaml
    from lorry.core.options import from_options

    top = {"base": own["base"], "out": own["out_folder"], "dtype": own["base_dtype"]}
    top |= {"task": own["task"], "checkpoint_every": own["checkpoint_every"]}
    top["loggers"] = names(own["loggers"]) or None
    top["planner"] = None if own["planner"] is None else plain_yaml(own["planner"], "--planner")
    given = {k: v for k, v in top.items() if v is not None}
    if own["config"] is not None:
        if job:
            flag = next(iter(job))
            raise OptionError(
                f"--{flag.replace('_', '-')} and a YAML file do not go together; put it into the file, or replace what "
                f"the file says with --set {flag}=VALUE."
            )
        return dataclasses.replace(read_run_file(own["config"], own["replaced"] or ()), **given)
    if own["replaced"]:
        raise OptionError("--set replaces values of a YAML file, and none is given; use the flags of the job.")
    missing = [
        f"--{name}"
        for name, there in (("base", own["base"]), ("data", job.get("data")), ("out", own["out_folder"]))
        if not there
    ]
    if missing:
        raise OptionError(f"Give a YAML file, or the flags of one job; missing: {', '.join(missing)}.")
    name = re.sub(r"[^A-Za-z0-9_.\-]+", "-", Path(str(own["out_folder"])).resolve().name).strip("-.") or "adapter"
    return from_options(RunFile, {**given, "jobs": [{"name": name, **job}]})


def execute(
    run: RunFile, *, resume: bool = False, overwrite: bool = False, processes: Processes | None = None
) -> dict[str, Any]:
    """Train all jobs and return the fleet's report; on several processes each of them does so."""
    from lorry.cli.output import err
    from lorry.cli.sizes import byte_count
    from lorry.training.fleet import Fleet

    model, processor, jobs = model_processor_and_jobs(run)
    fleet = Fleet(
        model,
        processor,
        jobs,
        run.out,
        checkpoint_every=run.checkpoint_every,
        keep_checkpoints=run.keep_checkpoints,
        max_pad_ratio=run.max_pad_ratio,
        max_tokens=run.max_tokens,
        base_dropout=run.base_dropout,
        planner=run.planner,
        max_memory=byte_count(run.max_memory),
        loggers=run.loggers,
        processes=processes,
        shard=run.shard,
        pipeline=run.pipeline,
        resume=resume,
        overwrite=overwrite,
        console=err(),
    )
    return fleet.train().report


def model_processor_and_jobs(run: RunFile) -> tuple[Any, Any, list[Job]]:
    """Load the base and what makes tensors of its data: the network of a pipeline and the pipeline, or a model and its
    tokenizer or image processor.
    """
    from lorry.cli.diffusion_bases import is_pipeline, load_pipeline
    from lorry.cli.new_heads import load_processor

    if is_pipeline(run.base):
        from lorry.diffusion import family_of

        pipeline = load_pipeline(run.base, run.dtype)
        return family_of(pipeline).network(pipeline), pipeline, run.job_list()
    model, jobs = base_and_jobs(run)
    return model, load_processor(run.base, {job.make_objective().task for job in jobs}), jobs


def base_and_jobs(run: RunFile) -> tuple[Any, list[Job]]:
    """Load the base with the head that the jobs need; parts of it that came without weights are
    trained by every job.
    """
    import dataclasses

    from lorry.cli.new_heads import load_for_training

    jobs = run.job_list()
    objectives = [job.make_objective() for job in jobs]
    tasks = {o.task for o in objectives if o.task is not None} if run.task == "auto" else {run.task}
    if len(tasks) > 1:
        raise OptionError(
            f"The objectives of these jobs need different heads ({', '.join(sorted(tasks))}), so they cannot share one "
            "run: make one for each head."
        )
    outputs = 0
    for index, (job, objective) in enumerate(zip(jobs, objectives, strict=True)):
        labels = job.labels or _labels(job, objective)
        if labels:
            jobs[index] = dataclasses.replace(job, labels=labels)
        outputs = max(outputs, objective.outputs or len(labels or ()))
    model, fresh = load_for_training(run.base, run.dtype, next(iter(tasks), "auto"), outputs or None)
    if fresh:
        note(f"{', '.join(fresh)}: new, so every job trains it whole and saves it beside its adapter")
        also = [[m] if isinstance(m := j.modules_to_save, str) else list(m) for j in jobs]
        jobs = [
            dataclasses.replace(j, modules_to_save=[*a, *(f for f in fresh if f not in a)])
            for j, a in zip(jobs, also, strict=True)
        ]
    return model, jobs


def _labels(job: Job, objective: Any) -> tuple[str, ...] | None:
    """Return a job's classes; None for an objective without, and for data that cannot be read, which the fleet reports
    as that job's failure.
    """
    from lorry.training.data import load_records
    from lorry.training.data_errors import DataError
    from lorry.training.task import Task

    if type(objective).labels_of is Task.labels_of:
        return None
    try:
        found = objective.labels_of(load_records(job.data))
        return None if found is None else tuple(found)
    except DataError:
        return None
