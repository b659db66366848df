"""``lorry split`` and ``lorry unite``: an adapter cut by the blocks that it sits in, and parts put together."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lorry.cli.arguments import Json, adapter_references
from lorry.cli.output import out, print_json, table
from lorry.core.errors import OptionError

if TYPE_CHECKING:
    from lorry.core.receipt import Receipt


def split(
    adapter: Annotated[Path, typer.Argument(help="Adapter: a folder, or a single file that tells its sites.")],
    to: Annotated[Path, typer.Option("--out", help="Folder for the parts, one folder for each.")],
    part: Annotated[
        list[str] | None,
        typer.Option(
            "--part",
            metavar="NAME=BLOCK",
            help="What is cut, and the module that it sits in; repeatable, also for one name. Without, the two halves "
            "of a B-LoRA.",
        ),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace parts that lie there.")] = False,
    as_json: Json = False,
) -> None:
    """Cut an adapter by the blocks that it sits in; each part is an adapter of its own."""
    from lorry.diffusion import b_lora
    from lorry.formats.reader import open_adapter
    from lorry.formats.regroup import part_of

    asked: dict[str, list[str]] = {}
    for text in part or ():
        name, found, block = text.partition("=")
        if not found or not name or not block:
            raise OptionError(f"--part expects NAME=BLOCK, found {text!r}.")
        asked.setdefault(name, []).append(block)
    with open_adapter(adapter) as file:
        parts = {n: part_of(file, blocks, n) for n, blocks in asked.items()} if asked else b_lora.split(file)
        receipts = {name: one.save(to / name, overwrite=overwrite) for name, one in parts.items()}
    _show(receipts, to, as_json)


def unite(
    adapter: Annotated[
        list[str],
        typer.Argument(metavar="[NAME=]DIR[:SCALE]...", help="Parts that sit at different places of one base."),
    ],
    to: Annotated[Path, typer.Option("--out", help="Folder for the adapter.")],
    preset: Annotated[
        str, typer.Option(help="linear, or released: scales act squared, as in B-LoRA's own program.")
    ] = "linear",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an adapter that lies there.")] = False,
    as_json: Json = False,
) -> None:
    """Put adapters of different blocks together, each with its scale: content of one picture, style of another."""
    from contextlib import ExitStack

    from lorry.diffusion import b_lora
    from lorry.formats.reader import open_adapter

    references = adapter_references(adapter)
    with ExitStack() as stack:
        files = {name: stack.enter_context(open_adapter(path)) for name, (path, _) in references.items()}
        scales = {name: weight for name, (_, weight) in references.items()}
        made = b_lora.compose(files, scales, preset=preset, name=to.name)  # type: ignore[arg-type]
        receipt = made.save(to, overwrite=overwrite)
    _show({to.name: receipt}, to.parent, as_json)


def _show(receipts: dict[str, Receipt], folder: Path, as_json: bool) -> None:
    if as_json:
        print_json({name: {"path": str(folder / name), **receipt.to_dict()} for name, receipt in receipts.items()})
        return
    rows = [(name, r.sites, r.tensors_total, folder / name) for name, r in receipts.items()]
    out().print(table("", ("adapter", "sites", "tensors", "folder"), rows, right=("sites", "tensors")))
