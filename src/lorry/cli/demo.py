"""``lorry demo``: the main job on the pocket model, from data to saved adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lorry.cli.arguments import Json
from lorry.cli.output import err, note, out, print_json, table


def demo(
    folder: Annotated[
        Path, typer.Option("--out", help="Folder for adapters, report.md, report.json and pictures.")
    ] = Path("out/demo"),
    steps: Annotated[int, typer.Option(min=1, help="Training steps of each adapter.")] = 100,
    test_rows: Annotated[int, typer.Option(min=1, max=500, help="Test words of each skill.")] = 200,
    picture_steps: Annotated[
        int, typer.Option(min=0, help="Training steps of each adapter for pictures; 0 leaves them out.")
    ] = 60,
    as_json: Json = False,
) -> None:
    """Train four adapters at once, mix, merge, save and load them, draw pictures with two more, and write a report."""
    from lorry.cli.bases import quiet
    from lorry.cli.pictures import before_after, curves, heat_map
    from lorry.cli.spectrum import site_facts
    from lorry.demo import job, page

    quiet()
    folder.mkdir(parents=True, exist_ok=True)
    counts = {"steps": steps, "test_rows": test_rows, "picture_steps": picture_steps}
    result = job.run(folder, **counts, say=note, bars=err().is_terminal)
    rows = [(a["name"], a["before"], a["after"]) for a in result.adapters]
    before_after(rows, folder / "before-after.png", "Exact match on held-out skills of the pocket model")
    curves(result.curves, folder / "losses.png", "Four jobs trained at once on one frozen base")
    first = result.adapters[0]["name"]
    heat_map(site_facts(folder / "adapters" / first), folder / "heat-map.png", f"Adapter '{first}'")
    written = page.write(result)
    if as_json:
        print_json(result.to_dict())
        return
    shown = [(name, f"{before:.1%}", f"{after:.1%}") for name, before, after in rows]
    out().print(table("Exact match", ("adapter", "before", "after"), shown, right=("before", "after")))
    out().print(f"{result.seconds:.0f} seconds; see {written}", highlight=False, soft_wrap=True)
