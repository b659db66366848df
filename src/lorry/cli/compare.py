"""``lorry compare``: how like each other adapters of one base are."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lorry.cli.arguments import Json, adapter_path
from lorry.cli.output import note, out, print_json


def compare(
    adapters: Annotated[
        list[str], typer.Argument(help="Two or more adapters of one base: folders, or names on the hub.")
    ],
    heatmap: Annotated[Path | None, typer.Option("--heatmap", help="Also draw the similarities as a PNG.")] = None,
    as_json: Json = False,
) -> None:
    """Show norms, cosines and subspace angles of adapters, for each site and over all."""
    from lorry.merging import compare as compared
    from lorry.merging import comparison_picture, comparison_table

    result = compared([str(adapter_path(path)) for path in adapters])
    if heatmap is not None:
        comparison_picture(result, heatmap)
        note(f"wrote {heatmap}")
    if as_json:
        print_json(result.to_dict())
    else:
        out().print(comparison_table(result))
