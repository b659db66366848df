"""``lorry simulate``: how a deployment of replicas would do, without a model."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lorry.cli.arguments import Json
from lorry.cli.declared import Declared, declared_options
from lorry.cli.output import err, note, out, print_json, progress, table
from lorry.core.errors import OptionError

if TYPE_CHECKING:
    from lorry.serving.scheduling.deployment import Report

_KINDS: dict[str, type] = {"int": int, "float": float, "str": str}
#: What the command itself gives to every deployment, and to the workload.
_SWEPT = ("replicas", "rate")
#: Columns of the table: the figure, its heading, and how it is written.
_COLUMNS = (
    ("replicas", "replicas", "{:.0f}"),
    ("requests per second", "requests/s", "{:.1f}"),
    ("tokens per second", "tokens/s", "{:.0f}"),
    ("first token p50", "first token p50", "{:.3f} s"),
    ("first token p99", "p99", "{:.3f} s"),
    ("attainment", "in time", "{:.1%}"),
    ("adapter hits", "adapter hits", "{:.1%}"),
    ("adapters held", "adapters held", "{:.0f}"),
    ("token share", "pool: tokens", "{:.0%}"),
    ("adapter share", "pool: adapters", "{:.0%}"),
    ("busy", "busy", "{:.0%}"),
)


def _signature(
    replicas: Annotated[str, typer.Option(help="Numbers of replicas to try, separated by commas.")] = "1,10,100",
    rate: Annotated[float | None, typer.Option(help="Requests in a second, for all replicas together.")] = None,
    rate_each: Annotated[
        float | None, typer.Option(help="Requests in a second for each replica, in the place of --rate. Default: 2.")
    ] = None,
    ranks: Annotated[str, typer.Option(help="Ranks of the adapters, which go round, separated by commas.")] = "8",
    policy: Annotated[str, typer.Option(help="Which waiting requests are tried first: fcfs, cluster, ...")] = "fcfs",
    calibrate: Annotated[
        str | None,
        typer.Option(metavar="BASE", help="Measure the costs of steps on this machine, with a base as of lorry serve."),
    ] = None,
    plot: Annotated[Path | None, typer.Option("--plot", help="Draw the figures into this PNG file.")] = None,
    as_json: Json = False,
) -> None:
    """Declare the flags that are not options of what is simulated."""


def simulate(**flags: Any) -> None:
    """Simulate replicas that serve many adapters: waiting, memory and hits for each number of replicas.

    Nothing is loaded: a step costs what the flags say, and admission, eviction and routing are those of the engine. The
    guide on sizing says what is assumed.
    """
    own = {name: flags.pop(name) for name in _OWN}
    given = {name: value for name, value in flags.items() if value is not None}
    if own["rate"] is not None and own["rate_each"] is not None:
        raise OptionError("Give either --rate for all replicas together or --rate-each.")
    numbers = _numbers(own["replicas"], "--replicas")
    costs = {} if own["calibrate"] is None else _calibrated(own["calibrate"])
    given = {**costs, **given}
    rows = []
    with progress() as shown:
        task = shown.add_task("simulating", total=len(numbers))
        for number in numbers:
            rows.append(_row(number, own, given))
            shown.advance(task)
    if own["plot"] is not None:
        from lorry.cli.pictures import lines

        path = lines(_panels(rows), own["plot"], "replicas", "Replicas, simulated")
        note(f"drew {path}")
    if own["as_json"]:
        print_json({"options": given, "rows": rows})
        return
    shown_rows = [[form.format(row[name]) for name, _, form in _COLUMNS] for row in rows]
    headings = [heading for _, heading, _ in _COLUMNS]
    out().print(table("", headings, shown_rows, right=headings))


def _row(number: int, own: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, float]:
    """Return the figures of so many replicas."""
    from lorry.serving.scheduling.deployment import Deployment
    from lorry.serving.scheduling.simulate import simulate as run
    from lorry.serving.scheduling.workload import Workload

    rate = own["rate"] if own["rate"] is not None else number * (2.0 if own["rate_each"] is None else own["rate_each"])
    asked = {name: given[name] for name in given if name in _WORKLOAD}
    has = {name: given[name] for name in given if name in _DEPLOYMENT}
    deployment = Deployment(replicas=number, policy=own["policy"], **has)
    workload = Workload(rate=rate, ranks=tuple(_numbers(own["ranks"], "--ranks")), **asked)
    report: Report = run(deployment, workload)
    row = report.row()
    row["token share"] = row["token pages"] / deployment.pages
    row["adapter share"] = row["adapter pages"] / deployment.pages
    row["tokens of a replica"] = row["tokens per second"] / number
    return row


def _numbers(text: str, flag: str) -> list[int]:
    try:
        found = [int(part) for part in text.split(",")]
    except ValueError:
        found = []
    if not found or min(found) < 1:
        raise OptionError(f"{flag}: expected numbers from 1, separated by commas, found '{text}'.")
    return found


def _calibrated(base: str) -> dict[str, float]:
    """Return what steps cost on this machine."""
    from lorry.cli.bases import load_base, load_tokenizer
    from lorry.serving.engine import Engine
    from lorry.serving.scheduling.measure import measured

    engine = Engine(load_base(base, "auto"), load_tokenizer(base))
    try:
        found = measured(engine)
    finally:
        engine.close()
    rows = [(name.replace("_", " "), f"{value:.3g}") for name, value in found.items()]
    err().print(table("Measured on this machine, in seconds", ("what", "seconds"), rows, right=("seconds",)))
    return found


def _panels(rows: Sequence[Mapping[str, float]]) -> dict[str, dict[str, list[tuple[float, float]]]]:
    """Return what is drawn: panel -> name -> points."""
    shown = {
        "first token, seconds": {"p50": "first token p50", "p99": "first token p99"},
        "shares": {
            "in time": "attainment",
            "adapter hits": "adapter hits",
            "pool: tokens": "token share",
            "pool: adapters": "adapter share",
            "busy": "busy",
        },
        "tokens in a second, each replica": {"": "tokens of a replica"},
    }
    return {
        panel: {label: [(row["replicas"], row[name]) for row in rows] for label, name in names.items()}
        for panel, names in shown.items()
    }


def _flags(fields: Sequence[Declared]) -> Iterator[inspect.Parameter]:
    """Yield the options of what is simulated as flags; None where they were not given."""
    for field in fields:
        kind = _KINDS.get(field.type.split("|")[0].strip(), str)
        text = f"{field.help} Default: {field.default}."
        flag = typer.Option(f"--{field.name.replace('_', '-')}", help=text, show_default=False)
        yield inspect.Parameter(
            field.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind | None, flag]
        )


def _declared(file: str, owner: str, but: Sequence[str]) -> list[Declared]:
    found = declared_options(f"serving/scheduling/{file}.py", owner)
    return [field for field in found if field.name not in (*_SWEPT, *but)]


_given = list(inspect.signature(_signature, eval_str=True).parameters.values())
_OWN = tuple(parameter.name for parameter in _given)
_of_workload = _declared("workload", "Workload", ())
_of_deployment = _declared("deployment", "Deployment", ("seed",))
# one seed is enough for both
_WORKLOAD = tuple(field.name for field in _of_workload)
_DEPLOYMENT = (*(field.name for field in _of_deployment), "seed")
simulate.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
    [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in _given] + list(_flags([*_of_workload, *_of_deployment]))
)
simulate.__annotations__ = {p.name: p.annotation for p in simulate.__signature__.parameters.values()}  # type: ignore[attr-defined]
