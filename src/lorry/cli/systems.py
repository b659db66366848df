"""``lorry systems``: published systems, and running one of them whole."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lorry.cli.arguments import Json
from lorry.cli.output import note, out, print_json, progress, table

group = typer.Typer(name="systems", rich_markup_mode=None)


@group.callback(invoke_without_command=True)
def systems(context: typer.Context, as_json: Json = False) -> None:
    """List published systems that are composed here; `run` runs one whole, from data to figures."""
    if context.invoked_subcommand is not None:
        return
    from lorry.systems import SYSTEMS

    rows = [(each.name, each.title, each.source) for each in SYSTEMS.values()]
    if as_json:
        print_json({"systems": [dict(zip(("name", "title", "source"), row, strict=True)) for row in rows]})
    else:
        out().print(table("Systems", ("name", "what it is", "source"), rows))


@group.command()
def run(
    name: Annotated[str, typer.Argument(help="A name from `lorry systems`.")],
    folder: Annotated[
        Path | None, typer.Option("--out", help="Folder for what it writes; out/NAME if not given.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of everything drawn.")] = 0,
    effort: Annotated[
        float, typer.Option(help="Factor of steps and data; below 1 gives a look, not a finding.", min=0.001)
    ] = 1.0,
    data: Annotated[
        Path | None, typer.Option("--data", help="Folder of public data sets, for systems that take one.")
    ] = None,
    base: Annotated[
        str | None, typer.Option("--base", help="Folder of a real checkpoint instead of the small model that ships.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Run a system whole, on the small model that ships or on a real checkpoint, and show what came out."""
    from dataclasses import asdict

    from lorry.cli.bases import quiet
    from lorry.systems import Run
    from lorry.systems import run as run_system

    quiet()
    where = folder or Path("out") / name
    with progress() as bar:
        bars = {}

        def step(what: str, done: int, total: int) -> None:
            if what not in bars:
                bars[what] = bar.add_task(what, total=total)
            bar.update(bars[what], completed=done, total=total)

        outcome = run_system(name, Run(where, seed, effort, data, base, step))
    if as_json:
        print_json(asdict(outcome))
        return
    out().print(table(name, tuple(outcome.columns), outcome.rows, right=tuple(outcome.columns[1:])))
    out().print(outcome.says, highlight=False, markup=False)
    for remark in outcome.notes:
        note(remark)
    for file in outcome.files:
        note(f"wrote {where / file}")
