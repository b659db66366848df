"""``lorry compare``: how like each other adapters of one base are."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lorry.cli.arguments import Json, adapter_path
from lorry.cli.blocks import By, pairs_by_block
from lorry.cli.output import note, out, print_json, table


def compare(
    adapters: Annotated[
        list[str], typer.Argument(help="Two or more adapters of one base: folders, or names on the hub.")
    ],
    heatmap: Annotated[Path | None, typer.Option("--heatmap", help="Also draw the similarities as a PNG.")] = None,
    by: Annotated[By, typer.Option("--by", help="A row for each site, or for each block.")] = By.site,
    as_json: Json = False,
) -> None:
    """Show norms, cosines and subspace angles of adapters, for each site or block and over all."""
    from lorry.merging import compare as compared
    from lorry.merging import comparison_picture, comparison_table

    result = compared([str(adapter_path(path)) for path in adapters])
    if heatmap is not None:
        comparison_picture(result, heatmap)
        note(f"wrote {heatmap}")
    blocks = pairs_by_block(result) if by is By.block else None
    if as_json:
        print_json(result.to_dict() | ({} if blocks is None else {"blocks": blocks}))
    elif blocks is not None:
        rows = [
            (pair.replace("|", " | "), block, f"{f['first_norm']:.3g} | {f['second_norm']:.3g}", f"{f['cosine']:+.3f}")
            for pair, found in blocks.items()
            for block, f in found.items()
        ]
        columns = ("pair", "block", "norms", "cosine")
        title = f"{len(result.names)} adapters, base {result.base}"
        out().print(table(title, columns, rows, right=columns[2:]))
    else:
        out().print(comparison_table(result))
