"""``lorry methods``."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any

import typer

from lorry.cli.arguments import Json
from lorry.cli.output import out, print_json, table

#: Kind of choice -> how its table is called; a job makes each choice by itself.
KINDS = {
    "structure": "Methods",
    "start": "Starts",
    "scaling": "Scalings",
    "dynamics": "Dynamics",
    "preset": "Presets: published names for combinations of these",
}


def methods(
    slug: Annotated[
        str | None,
        typer.Argument(help="Show this method, preset, start, scaling or dynamic alone, with the help of each option."),
    ] = None,
    kind: Annotated[
        str, typer.Option(help="What to list: structure (the methods), start, scaling, dynamics, or preset.")
    ] = "structure",
    as_json: Json = False,
) -> None:
    """List the methods: paper, family, site kinds, options, and what can be done with each; or starts,
    scalings, dynamics, or presets.
    """
    from lorry.core.errors import OptionError, near_misses

    if kind not in KINDS:
        raise OptionError(
            f"There is no kind '{kind}' of choices.{near_misses(kind, KINDS)} There are: {', '.join(KINDS)}."
        )
    if kind == "structure":
        _structures(slug, as_json)
    elif kind == "preset":
        _presets(slug, as_json)
    else:
        _others(kind, slug, as_json)


def _structures(slug: str | None, as_json: bool) -> None:
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


def _others(kind: str, slug: str | None, as_json: bool) -> None:
    """Show the starts, the scalings or the dynamics."""
    from lorry.core.registry import Registry
    from lorry.training.hooks import DYNAMICS
    from lorry.training.scalings import SCALINGS
    from lorry.training.starts import STARTS

    registries: dict[str, Registry[Any]] = {"start": STARTS, "scaling": SCALINGS, "dynamics": DYNAMICS}
    registry = registries[kind]
    if slug is not None:
        registry.find(slug)
    known = {name: _facts(cls) for name, cls in registry.items() if slug in (None, name)}
    if as_json:
        print_json({kind: known})
        return
    rows = [(name, facts["paper"], " ".join(facts["needs"]) or "-", facts["is"]) for name, facts in known.items()]
    out().print(table(KINDS[kind], (kind, "paper", "looks at", "is"), rows))
    if slug is not None:
        _print_options(known)


def _presets(slug: str | None, as_json: bool) -> None:
    """Show what published names stand for."""
    from lorry.core.method.registry import presets
    from lorry.training.presets import COMBINATIONS, named

    names = sorted({*COMBINATIONS, *presets()}) if slug is None else [slug]
    known = {name: named(name).to_dict() for name in names}
    if as_json:
        print_json({"preset": known})
        return
    parts = ("method", "start", "scaling", "dynamics")
    rows = [(name, facts["paper"], *(_written(facts[part]) for part in parts)) for name, facts in known.items()]
    out().print(table(KINDS["preset"], ("preset", "paper", *parts), rows))


def _written(part: Any) -> str:
    """Return a part of a preset as a flag has it: ``NAME:OPTION=VALUE``, several separated by commas."""
    if isinstance(part, list):
        return ", ".join(map(_written, part)) or "-"
    if isinstance(part, dict):
        name, *options = part.items()
        return ":".join([str(name[1]), *(f"{k}={v}" for k, v in options)])
    return str(part or "-")


def _facts(cls: type) -> dict[str, Any]:
    """Return the facts of a registered class as plain data, with its options and their help."""
    fields = dataclasses.fields(cls)
    return {
        "paper": getattr(cls, "paper", ""),
        "is": " ".join((cls.__doc__ or "").split("\n\n")[0].split()),
        "needs": list(getattr(cls, "probes", ())),
        "class": cls.__name__,
        "options": {f.name: {"default": f.default, "help": f.metadata.get("help", "")} for f in fields},
    }


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
        _print_options(known)


def _print_options(known: dict[str, Any]) -> None:
    for slug, info in known.items():
        options = [(name, _default(o), o["help"]) for name, o in info["options"].items()]
        out().print(table(f"Options of {slug}", ("option", "default", "meaning"), options))


def _default(option: dict[str, Any]) -> str:
    text = repr(option["default"])
    return "required" if "MISSING" in text else text.strip("'")
