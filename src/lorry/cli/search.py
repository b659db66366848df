"""``lorry search``: adapters of a folder, found by what they do."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from lorry.cli.arguments import Json, key_values
from lorry.cli.output import note, out, print_json
from lorry.core.errors import OptionError, some


def search(
    text: Annotated[str, typer.Argument(help="What is wanted, in words.")],
    depot: Annotated[Path, typer.Argument(help="Folder of adapter folders; captions.txt in them says what they make.")],
    top_k: Annotated[int, typer.Option("--top-k", "-k", help="How many to show.", min=1)] = 3,
    build: Annotated[bool, typer.Option("--build", help="Train the index anew, although there is one.")] = False,
    option: Annotated[
        list[str] | None,
        typer.Option("--option", "-o", metavar="KEY=VALUE", help="steps, rows, rate of its training; repeatable."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of its training.")] = 0,
    as_json: Json = False,
) -> None:
    """Find adapters by words, from their weights alone: the index learns from those that have captions."""
    from lorry.core.options import from_options
    from lorry.depot.index import FACTS, INDEX, build_index, load_index
    from lorry.depot.retriever import RetrieverTraining

    place = depot / INDEX
    if build or not (place / FACTS).is_file():
        note(f"building the index of {depot}")
        index = build_index(depot, settings=from_options(RetrieverTraining, key_values(option)), seed=seed)
        index.save(place)
    else:
        if option:
            raise OptionError("Options of the training need --build, since there is an index already.")
        index = load_index(place)
        if apart := index.apart_from(depot):
            note(f"The index is older than the folder: {some(apart)} came or went; --build makes it anew.")
    hits = index.search(text, top_k)
    if as_json:
        print_json({"text": text, "hits": [asdict(hit) for hit in hits]})
        return
    for hit in hits:
        out().print(f"{hit.score:+.3f}  {depot / hit.name}", highlight=False, markup=False, soft_wrap=True)
