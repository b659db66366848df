"""``lorry probe``: what each block of a network does to pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lorry.cli.arguments import Dtype, Json
from lorry.cli.output import note, out, print_json, progress, table
from lorry.core.errors import OptionError

ARROW = "=>"


def probe(
    base: Annotated[str, typer.Argument(help="Folder of a diffusers pipeline with a U-Net, or a name on the hub.")],
    pair: Annotated[
        list[str] | None,
        typer.Option("--pair", "-p", metavar="TEXT=>TEXT", help="A prompt and the one that a block reads; repeatable."),
    ] = None,
    block: Annotated[list[str] | None, typer.Option("--block", help="Block to try; repeatable. All if none.")] = None,
    seed: Annotated[list[int] | None, typer.Option("--seed", help="Seed of the noise; repeatable.")] = None,
    steps: Annotated[int, typer.Option(min=1, help="Steps of the scheduler.")] = 20,
    height: Annotated[int | None, typer.Option(help="Height in pixels; the pipeline's own if not given.")] = None,
    width: Annotated[int | None, typer.Option(help="Width in pixels; the pipeline's own if not given.")] = None,
    picture: Annotated[Path | None, typer.Option("--picture", help="Also draw a heat-map into this PNG file.")] = None,
    dtype: Dtype = "auto",
    as_json: Json = False,
) -> None:
    """Let one block at a time read another prompt, and say how far pictures go towards it."""
    from lorry.cli.diffusion_bases import load_pipeline
    from lorry.cli.pictures import block_map
    from lorry.diffusion import probe as measure

    pairs = [_pair(text) for text in pair or ()]
    if not pairs:
        raise OptionError("There is nothing to try: give --pair 'a red square=>a blue square'.")
    pipeline = load_pipeline(base, dtype)
    with progress() as bar:
        shown = bar.add_task("runs", total=None)
        seeds = seed or [0, 1]
        found = measure(
            pipeline,
            pairs,
            blocks=block or None,
            seeds=seeds,
            callback=lambda done, total: bar.update(shown, completed=done, total=total),
            steps=steps,
            height=height,
            width=width,
        )
    if picture is not None:
        block_map({f"{p.first} {ARROW} {p.second}": p.shares for p in found}, picture, "How far a block alone goes")
        note(f"the heat-map is in {picture}")
    if as_json:
        print_json([{"first": p.first, "second": p.second, "shares": p.shares} for p in found])
        return
    columns = [f"{p.first} {ARROW} {p.second}" for p in found]
    rows = [(name, *(f"{p.shares[name]:.3f}" for p in found)) for name in found[0].shares]
    out().print(table("", ("block", *columns), rows, right=columns))


def _pair(text: str) -> tuple[str, str]:
    first, found, second = (part.strip() for part in text.partition(ARROW))
    if not (first and found and second):
        raise OptionError(f"--pair expects two prompts with {ARROW} between them, found '{text}'.")
    return first, second
