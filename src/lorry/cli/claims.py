"""``lorry claims``: what papers say, what came out here, and running it again."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lorry.cli.arguments import Json
from lorry.cli.output import note, out, print_json, table, write_text

group = typer.Typer(name="claims", rich_markup_mode=None)

Records = Annotated[
    Path | None, typer.Option("--records", help="Folder of records; those of this version if not given.")
]


@group.callback(invoke_without_command=True)
def claims(context: typer.Context, records: Records = None, as_json: Json = False) -> None:
    """Show published claims with what came out here, and which records are older than the code that they ran; `run`
    tries them again, `page` makes the document.
    """
    if context.invoked_subcommand is not None:
        return
    from dataclasses import asdict

    from lorry.claims.ledger import RECORDS, changed_since, read_records
    from lorry.claims.page import table_rows

    found = read_records(records or RECORDS)
    if as_json:
        print_json({"records": [{**asdict(record), "changed_since": changed_since(record)} for record in found]})
    else:
        out().print(table("Claims", ("claim", "verdict", "what came out"), table_rows(found)))


@group.command()
def run(
    slug: Annotated[str, typer.Argument(help="Method or topic, or SLUG/KEY for one claim of it.")],
    seeds: Annotated[int, typer.Option(help="Seeds of every contender.", min=1)] = 3,
    effort: Annotated[
        float, typer.Option(help="Factor of steps and data; below 1 gives a look, not a finding.", min=0.001)
    ] = 1.0,
    records: Annotated[Path, typer.Option("--records", help="Folder to write the record to.")] = Path("claims"),
    data: Annotated[
        Path | None, typer.Option(help="Folder of public data sets, for studies on real text.", exists=True)
    ] = None,
    as_json: Json = False,
) -> None:
    """Run the trials of a method's claims, and write the record."""
    from dataclasses import asdict

    from lorry.claims import ledger

    chosen = [ledger.CLAIMS.find(slug)] if "/" in slug else ledger.claims(slug)
    found = []
    for one in chosen:
        note(f"{one.name}: {one.says}")
        record = ledger.run(one, ledger.Setting(tuple(range(seeds)), effort, data))
        found.append(record)
        for path in ledger.write_records([record], records):
            note(f"{record.finding.verdict} after {record.seconds:.0f} s; wrote {path}")
    if as_json:
        print_json({"records": [asdict(record) for record in found]})
    else:
        rows = [(record.name, record.finding.verdict, record.finding.summary) for record in found]
        out().print(table("", ("claim", "verdict", "what came out"), rows))


@group.command()
def page(
    out_file: Annotated[Path, typer.Option("--out", help="The document; plots go into a folder beside it.")],
    records: Records = None,
) -> None:
    """Make a document with a table and a plot for each claim."""
    from lorry.claims.ledger import RECORDS, read_records
    from lorry.claims.page import draw, markdown
    from lorry.cli.output import progress

    found = read_records(records or RECORDS)
    pictures = out_file.parent / out_file.stem
    with progress() as bar:
        for record in bar.track(found, description="plots"):
            draw(record, pictures)
    write_text(out_file, markdown(found, out_file.stem))
    note(f"wrote {out_file} and {len(found)} plots in {pictures}")
