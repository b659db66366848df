"""``lorry study``: variants of training compared over learning rates, ranks, batch sizes and seeds."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lorry.cli.arguments import Json, number
from lorry.cli.output import failure, note, out, print_json, progress, table
from lorry.core.errors import OptionError

if TYPE_CHECKING:
    from lorry.training.study import Record, Study, StudyResult


def study(
    config: Annotated[
        Path, typer.Argument(help="YAML with base, out, job, variants and rates (`lorry init study` writes one).")
    ],
    out_folder: Annotated[
        str | None, typer.Option("--out", help="Folder for the results, in place of the file's.")
    ] = None,
    replaced: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="KEY=VALUE", help="Replace a value of the YAML, e.g. seeds=[0], steps=10; repeatable."
        ),
    ] = None,
    ray: Annotated[
        bool, typer.Option("--ray", help="Run the fleets as Ray tasks, on a local cluster if no address is given.")
    ] = False,
    address: Annotated[
        str | None,
        typer.Option("--ray-address", help="Of a cluster to use: 'auto', HOST:PORT or ray://HOST:PORT; means --ray."),
    ] = None,
    gpus: Annotated[float, typer.Option("--gpus", help="Of each Ray task; a fraction shares one.", min=0)] = 0.0,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the results of another study in the output folder.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Compare variants over rates, ranks, batch sizes and seeds; a study that was stopped goes on where it was."""
    asked = read(config, [*(replaced or ()), *([f"out={out_folder}"] if out_folder else ())])
    result = execute(asked, ray=address or ray, gpus=gpus, overwrite=overwrite)
    if as_json:
        print_json(result.report)
        return
    _show(result)


def read(path: Path, overrides: Sequence[str] = ()) -> Study:
    """Read and check a study's file.

    Raises
    ------
    OptionError
        Not there, not YAML, an unknown key (with near misses), or a bad value.
    """
    from lorry.cli.overrides import override
    from lorry.cli.sizes import byte_count
    from lorry.cli.yaml_text import yaml_mapping
    from lorry.training.study import Study

    values = yaml_mapping(path, "base, out, job and variants")
    try:
        changed = override(values, overrides, {f.name for f in dataclasses.fields(Study)}, job="job")
        if isinstance(changed.get("rates"), list):  # --set reads 1e-3 as text, as YAML 1.1 does
            changed["rates"] = [number(rate) for rate in changed["rates"]]
        if isinstance(changed.get("max_memory"), str):
            changed["max_memory"] = byte_count(changed["max_memory"])
        return Study.from_dict(changed)
    except OptionError as error:
        raise OptionError(f"{path}: {error}") from None


def load(base: str, dtype: str, jobs: Sequence[Mapping[str, Any]]) -> tuple[Any, Any]:
    """Load a study's base with the head that its jobs need, and what makes tensors of its data."""
    from lorry.cli.new_heads import load_processor
    from lorry.cli.run_file import RunFile
    from lorry.cli.train import base_and_jobs

    run = RunFile(base, "study", [dict(job) for job in jobs], dtype=dtype)
    model, made = base_and_jobs(run)
    return model, load_processor(base, {job.make_objective().task for job in made})


def execute(asked: Study, *, ray: bool | str = False, gpus: float = 0.0, overwrite: bool = False) -> StudyResult:
    """Run a study, with a bar where there is a terminal."""
    from lorry.training.study import run_study

    asked, jobs = prepared(asked)
    with progress() as bar:
        task = bar.add_task("runs", total=None)

        def told(done: float, planned: int, records: Sequence[Record]) -> None:
            lost = sum(record.status != "done" for record in records)
            said = f"runs, {lost} without an end" if lost else "runs"
            bar.update(task, completed=done, total=planned, description=said)

        try:
            return run_study(
                asked, partial(load, asked.base, asked.dtype, jobs), ray=ray, gpus=gpus, overwrite=overwrite, told=told
            )
        except KeyboardInterrupt:
            raise KeyboardInterrupt(f"stopped; the same command goes on from what is in {asked.out}") from None


def prepared(asked: Study) -> tuple[Study, list[dict[str, Any]]]:
    """Return a study whose jobs know their classes and train what is new in the base, and a job of each objective."""
    from lorry.cli.run_file import RunFile
    from lorry.cli.train import base_and_jobs

    first = {cell.variant: cell for cell in reversed(asked.cells())}
    made = [asked.job_of(cell) for cell in first.values()]
    if {job.make_objective().task for job in made} <= {None, "causal-lm"}:
        return asked, [_fields(job) for job in made]
    # the head is part of the base, so it is looked at once for the names of what came without weights
    model, jobs = base_and_jobs(RunFile(asked.base, asked.out, [_fields(job) for job in made], dtype=asked.dtype))
    del model
    also = {job.modules_to_save if isinstance(job.modules_to_save, str) else tuple(job.modules_to_save) for job in jobs}
    if len(also) > 1:
        raise OptionError(
            "The variants train different modules beside their adapters; give modules_to_save under 'job'."
        )
    (saved,) = also
    whole = dict(asked.job)
    whole |= {"modules_to_save": list(saved)} if saved else {}
    whole |= {"labels": list(jobs[0].labels)} if jobs[0].labels else {}
    return dataclasses.replace(asked, job=whole), [_fields(job) for job in jobs]


def _fields(job: Any) -> dict[str, Any]:
    return {f.name: getattr(job, f.name) for f in dataclasses.fields(job)}


def _show(result: StudyResult) -> None:
    from lorry.training.study.report import sentences, share_rows, standing_columns, standing_rows

    columns = standing_columns(result.analysis)
    rows = standing_rows(result.analysis, result.records)
    way = "higher" if result.analysis.better == "max" else "lower"
    out().print(table(f"{len(result.records)} runs; {way} is better", columns, rows, right=columns[1:]))
    shares = share_rows(result.analysis)
    if shares:
        columns = ["source", "part of the variance"]
        out().print(table("What explains the scores", columns, shares, right=columns[1:]))
    for text in sentences(result.analysis):
        out().print(text, markup=False, highlight=False, soft_wrap=True)
    for record in result.records:
        if record.status == "failed":
            failure(f"run '{record.cell.name}' failed: {record.reason}")
    note(f"report.html, report.json and rates.png are in {result.folder}")
