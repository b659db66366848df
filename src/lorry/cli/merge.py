"""``lorry merge``: adapters with each other, by a recipe or by flags."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lorry.cli.arguments import CheckBase, Dtype, Head, Json, adapter_references
from lorry.cli.fuse import into_base
from lorry.cli.output import note, out, print_json
from lorry.core.errors import OptionError

if TYPE_CHECKING:
    from lorry.merging import MergedAdapter, Mixture


def merge(
    source: Annotated[
        str | None,
        typer.Argument(
            help="A recipe (.yaml); without it, the adapters and the way are given by flags. (A base here means "
            "`lorry fuse`, for one more release.)"
        ),
    ] = None,
    adapter: Annotated[
        list[str] | None,
        typer.Option("--adapter", "-a", metavar="[NAME=]DIR[:WEIGHT]", help="Adapter to merge; repeatable."),
    ] = None,
    method: Annotated[
        str | None,
        typer.Option(
            "--method",
            "-m",
            help="How adapters are merged with each other: a merge method, or a method that takes adapters in.",
            show_default=False,
        ),
    ] = None,
    option: Annotated[
        list[str] | None, typer.Option("--option", "-o", help="KEY=VALUE, an option of it; repeatable.")
    ] = None,
    to: Annotated[Path | None, typer.Option("--out", help="Folder for the merged model; must not exist.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the folder if it exists.")] = False,
    check_base: CheckBase = True,
    dtype: Dtype = "auto",
    task: Head = "auto",
    as_json: Json = False,
) -> None:
    """Merge adapters with each other, by a recipe or by flags; the result is an adapter, with a receipt."""
    if source is None:
        with_each_other(adapter, method, option, to, overwrite, check_base, as_json)
        return
    if method is not None or option:
        raise OptionError(
            f"--method and --option say how adapters are merged with each other, so {source} has no place beside them."
        )
    if source.endswith((".yaml", ".yml")):
        if adapter:
            raise OptionError(f"{source} is a recipe; it names the adapters itself, so --adapter has no place here.")
        by_recipe(source, to, overwrite, as_json)
        return
    note("putting adapters into a base is called `lorry fuse` now; `lorry merge BASE` works for one more release")
    into_base(source, adapter, to, overwrite, check_base, dtype, task, as_json)


def by_recipe(source: str, to: Path | None, overwrite: bool, as_json: bool) -> None:
    """Merge adapters with each other as a YAML file says; the result is an ordinary adapter folder."""
    from lorry.cli.bases import load_base
    from lorry.merging import merge_recipe

    _show(merge_recipe(source, out=to, overwrite=overwrite, load_model=load_base), as_json)


def with_each_other(
    adapter: list[str] | None,
    method: str | None,
    option: list[str] | None,
    to: Path | None,
    overwrite: bool,
    check_base: bool,
    as_json: bool,
) -> None:
    """Merge adapters with each other as flags say; the result is an ordinary adapter folder."""
    from lorry.cli.arguments import key_values
    from lorry.merging.recipe import recipe_from, run_recipe

    references = adapter_references(adapter)
    if not references or to is None:
        raise OptionError("Merging adapters with each other needs at least one --adapter DIR and --out DIR.")
    weighted = any(weight != 1 for _, weight in references.values())
    inputs = {n: {"path": str(p), **({"weight": w} if weighted else {})} for n, (p, w) in references.items()}
    values = {
        "inputs": inputs,
        "options": key_values(option) or None,
        "check_base": check_base,
        "name": to.resolve().name,
    }
    recipe = recipe_from(values if method is None else {**values, "method": method})
    _show(run_recipe(recipe, Path(), out=to, overwrite=overwrite), as_json)


def _show(merged: MergedAdapter | Mixture, as_json: bool) -> None:
    if as_json:
        print_json(merged.receipt.to_dict())
    else:
        out().print(str(merged.receipt), highlight=False, markup=False, soft_wrap=True)
