"""``lorry bench``: dispatch to the modules of `lorry.bench`."""

from __future__ import annotations

import importlib
import importlib.util
import json
import keyword
import pkgutil
from pathlib import Path
from typing import Annotated, Any

import typer

from lorry.cli.arguments import Json, key_values
from lorry.cli.output import note, out, print_json, table, write_text
from lorry.core.errors import OptionError, near_misses


def available() -> dict[str, str]:
    """Return the benches by name, each with the first line of its docstring, without running any."""
    if importlib.util.find_spec("lorry.bench") is None:
        return {}
    package = importlib.import_module("lorry.bench")
    found = {}
    for module in pkgutil.iter_modules(package.__path__):
        if module.name.startswith("_"):
            continue
        spec = importlib.util.find_spec(f"lorry.bench.{module.name}")
        text = Path(spec.origin).read_text(encoding="utf-8") if spec and spec.origin else ""
        if "\ndef run(" in text:
            found[module.name.rstrip("_").replace("_", "-")] = _first_line(text)
    return found


def bench(
    name: Annotated[str | None, typer.Argument(help="Which bench; without a name they are listed.")] = None,
    option: Annotated[
        list[str] | None,
        typer.Option("--option", "-o", metavar="KEY=VALUE", help="An option of the bench; repeatable."),
    ] = None,
    save: Annotated[Path | None, typer.Option("--out", help="Also write the result as JSON to this file.")] = None,
    as_json: Json = False,
) -> None:
    """Run one comparison side by side, against the peer and against the floor."""
    benches = available()
    if name is None:
        if as_json:
            print_json({"benches": benches})
        else:
            out().print(table("Benches", ("name", "what it compares"), benches.items()))
        return
    if name not in benches:
        listed = f" There is: {', '.join(benches)}." if benches else " This installation has none."
        raise OptionError(f"There is no bench '{name}'.{near_misses(name, benches)}{listed}")
    module = importlib.import_module(f"lorry.bench.{_module_name(name)}")
    result = _run(module, name, key_values(option))
    if save is not None:
        from lorry.cli.output import plain

        write_text(save, json.dumps(plain(result), indent=2) + "\n")
        note(f"wrote {save}")
    if as_json:
        print_json(result)
        return
    shown = getattr(module, "table", None)
    out().print(shown(result) if callable(shown) else json.dumps(result, indent=2, default=str))


def _module_name(name: str) -> str:
    """Return the module of a bench; one called like a keyword has an underscore behind it."""
    return f"{name}_" if keyword.iskeyword(name) else name.replace("-", "_")


def _run(module: Any, name: str, options: dict[str, Any]) -> dict[str, Any]:
    """Run a bench; an option that its `run` does not take is misuse."""
    import inspect

    parameters = inspect.signature(module.run).parameters
    open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    for key in options:
        if key not in parameters and not open_ended:
            raise OptionError(f"The bench '{name}' has no option '{key}'.{near_misses(key, parameters)}")
    result = module.run(**options)
    return dict(result)


def _first_line(source: str) -> str:
    import ast

    return (ast.get_docstring(ast.parse(source)) or "").partition("\n")[0]
