"""``lorry methods``."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from lorry.cli.arguments import Json
from lorry.cli.output import out, print_json, table


def methods(
    slug: Annotated[
        str | None, typer.Argument(help="Show this method or preset alone, with the help of each option.")
    ] = None,
    as_json: Json = False,
) -> None:
    """List the methods: paper, family, site kinds, options, and what can be done with each."""
    from lorry.core.method.registry import METHODS, presets

    known = {name: info.to_dict() for name, info in METHODS.items()}
    named = {name: {"of": p.of, "paper": p.paper, "options": dict(p.options)} for name, p in presets().items()}
    if slug is not None:
        if slug not in named:
            METHODS.find(slug, also=named)
        known = {k: v for k, v in known.items() if k in (slug, named.get(slug, {}).get("of"))}
        named = {k: v for k, v in named.items() if k == slug}
    if as_json:
        print_json({"methods": known, "presets": named})
    else:
        _print(known, named, detail=slug is not None)


def _print(known: dict[str, Any], named: dict[str, Any], detail: bool) -> None:
    columns = ("method", "paper", "family", "site kinds", "identity at start", "fuse", "options")
    rows = [
        (
            slug,
            info["paper"],
            info["family"],
            " ".join(info["kinds"]),
            "yes" if info["identity_at_start"] else "no",
            info["fuse"],
            ", ".join(f"{name}={_default(option)}" for name, option in info["options"].items()),
        )
        for slug, info in known.items()
    ]
    out().print(table("Methods", columns, rows))
    if named:
        shown = [
            (slug, p["paper"], f"{p['of']} with " + ", ".join(f"{k}={v}" for k, v in p["options"].items()))
            for slug, p in named.items()
        ]
        out().print(table("Presets", ("preset", "paper", "is"), shown))
    if detail:
        for slug, info in known.items():
            options = [(name, _default(o), o["help"]) for name, o in info["options"].items()]
            out().print(table(f"Options of {slug}", ("option", "default", "meaning"), options))


def _default(option: dict[str, Any]) -> str:
    text = repr(option["default"])
    return "required" if "MISSING" in text else text.strip("'")
