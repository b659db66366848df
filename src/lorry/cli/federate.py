"""``lorry federate``: one adapter of many clients' data, simulated here or over Flower."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lorry.cli.arguments import Json
from lorry.cli.output import note, out, print_json, table
from lorry.core.errors import OptionError

if TYPE_CHECKING:
    from lorry.federated import Client, Federation, FederationResult
    from lorry.training.task import Setting


def federate(
    config: Annotated[Path, typer.Argument(help="YAML with base, out, job, clients, rounds and so on.")],
    replaced: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="KEY=VALUE", help="Replace a value of the YAML, e.g. rounds=5, rank=4; repeatable."
        ),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on after the last round in the output folder.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a federation in the output folder.")] = False,
    flower: Annotated[
        Path | None,
        typer.Option("--flower", metavar="DIR", help="Write a Flower app for `flwr run DIR` and stop."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Train one adapter over many clients whose data stay where they are; by itself a simulation in this process."""
    if flower is not None:
        from lorry.federated.flower import write_app

        if replaced:
            raise OptionError("A Flower app reads the run file itself; put the values of --set into it.")
        read(config)
        write_app(flower, config)
        note(f"{flower} holds a Flower app: flwr run {flower}")
        return
    result = execute(read(config, replaced), resume=resume, overwrite=overwrite)
    if as_json:
        print_json({**result.report, "receipt": result.receipt.to_dict()})
        return
    out().print(_table(result))
    out().print(str(result.receipt), highlight=False, markup=False, soft_wrap=True)
    note(f"the adapter is {result.path}, the report {result.path.with_name('report.json')}")


def read(path: Path, overrides: list[str] | None = None) -> Federation:
    """Read and check a run file.

    Raises
    ------
    OptionError
        Not there, not YAML, an unknown key (with near misses), or a bad value.
    """
    from lorry.cli.overrides import override
    from lorry.cli.yaml_text import yaml_mapping
    from lorry.core.options import from_options
    from lorry.federated import Federation

    values = yaml_mapping(path, "base, out and job")
    try:
        known = {f.name for f in dataclasses.fields(Federation)}
        return from_options(Federation, override(values, overrides or (), known, job="job"))
    except OptionError as error:
        raise OptionError(f"{path}: {error}") from None


def loaded(options: Federation) -> tuple[Federation, Setting]:
    """Return the run file with what the base's head needs filled in, and the base with its tokenizer."""
    from lorry.cli.bases import load_tokenizer
    from lorry.cli.run_file import RunFile
    from lorry.cli.train import base_and_jobs
    from lorry.training.task import Setting

    job = options.make_job()
    fields = {f.name: getattr(job, f.name) for f in dataclasses.fields(job)}
    model, jobs = base_and_jobs(RunFile(options.base, options.out, [fields], dtype=options.dtype))
    setting = Setting(model, load_tokenizer(options.base))
    return dataclasses.replace(options, job=jobs[0]), setting


def execute(options: Federation, *, resume: bool = False, overwrite: bool = False) -> FederationResult:
    """Simulate a federation in this process."""
    from lorry.federated import simulate

    if overwrite and (Path(options.out) / "clients").is_dir():
        shutil.rmtree(Path(options.out) / "clients")  # what simulated clients spent goes with the run that spent it
    options, setting = loaded(options)
    clients = {name: _client(options, name, setting) for name in options.names()}
    return simulate(options, setting, clients, resume=resume, overwrite=overwrite)


def _client(options: Federation, name: str, setting: Setting) -> Client:
    from lorry.federated import Client

    return Client(options, name, setting, folder=Path(options.out) / "clients" / name)


def flower_server() -> Any:
    """Return Flower's ServerApp, which reads the run file that ``--run-config run=FILE`` names."""
    from lorry.federated import Server
    from lorry.federated.flower import server_app

    def make(config: Mapping[str, Any], transport: Callable[[int], Any]) -> Server:
        options, setting = loaded(read(Path(str(config["run"]))))
        resume, overwrite = bool(config.get("resume")), bool(config.get("overwrite"))
        return Server(options, setting, transport(options.minimum), resume=resume, overwrite=overwrite)

    return server_app(make)


def flower_client() -> Any:
    """Return Flower's ClientApp, which reads the run file of ``--node-config 'run="FILE" client="NAME"'``."""
    from lorry.federated.flower import client_app

    def make(config: Mapping[str, Any]) -> tuple[str, Callable[[], Client]]:
        if not {"run", "client"} <= set(config):
            raise OptionError('A node needs --node-config \'run="FILE" client="NAME"\'.')
        options, name = read(Path(str(config["run"]))), str(config["client"])
        return name, lambda: _client(*_with_setting(options, name))

    return client_app(make)


def _with_setting(options: Federation, name: str) -> tuple[Federation, str, Setting]:
    options, setting = loaded(options)
    return options, name, setting


def _table(result: FederationResult) -> Any:
    columns = ("round", "clients", "failed", "loss", "aggregation error", "bytes up", "bytes down")
    rows = []
    for r in result.report["rounds"]:
        loss = "-" if r["loss"] is None else f"{r['loss']:.4f}"
        error = f"{r['aggregation_error']:.1e}"
        rows.append((r["round"], len(r["clients"]), len(r["failed"]), loss, error, r["bytes_up"], r["bytes_down"]))
    evaluation = result.report["evaluation"] or {}
    title = "  ".join(f"{k} {v:.4g}" for k, v in evaluation.items())
    return table(f"federation  {title}".strip(), columns, rows, right=columns)
