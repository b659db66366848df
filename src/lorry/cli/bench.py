"""``lorry bench``: what `lorry.bench` compares, listed and run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from lorry.cli.arguments import Json, key_values
from lorry.cli.output import note, out, plain, print_json, table, write_text


def bench(
    name: Annotated[str | None, typer.Argument(help="Which bench; without a name they are listed.")] = None,
    option: Annotated[
        list[str] | None,
        typer.Option("--option", "-o", metavar="KEY=VALUE", help="An option of the bench; repeatable."),
    ] = None,
    save: Annotated[Path | None, typer.Option("--out", help="Also write the result as JSON to this file.")] = None,
    as_json: Json = False,
) -> None:
    """Run one comparison side by side, against the peer and against the floor."""
    from lorry.bench import BENCHES

    if name is None:
        listed = {one.name: one.help for one in BENCHES.values()}
        if as_json:
            print_json({"benches": listed})
        else:
            out().print(table("Benches", ("name", "what it compares"), listed.items()))
        return
    chosen = BENCHES.find(name)
    result = chosen.run(key_values(option))
    if save is not None:
        write_text(save, json.dumps(plain(result), indent=2) + "\n")
        note(f"wrote {save}")
    if as_json:
        print_json(result)
    else:
        out().print(chosen.table(result))
