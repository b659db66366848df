"""Options that several commands share, and how their text becomes data."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from lorry.cli.hub import from_hub, is_hub_name, repository
from lorry.core.errors import OptionError

BASE_HELP = "'pocket', a local Hugging Face model folder, or a name on the hub (OWNER/NAME@REVISION)."
BaseArgument = Annotated[str, typer.Argument(help=BASE_HELP)]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout and nothing else.")]
MethodOption = Annotated[str, typer.Option("--method", "-m", help="Method slug or preset; see `lorry methods`.")]
MethodOptions = Annotated[
    list[str] | None,
    typer.Option("--option", "-o", metavar="KEY=VALUE", help="An option of the method; repeatable."),
]
TargetsOption = Annotated[
    list[str] | None,
    typer.Option(
        "--targets",
        "-t",
        help="Preset (all-linear, attention, mlp, ...), name, suffix, pattern with *, kind:NAME or re:REGEX; "
        "repeatable, or separated by commas.",
    ),
]
ExcludeOption = Annotated[
    list[str] | None, typer.Option("--exclude", help="Sites to leave out, written like targets; repeatable.")
]
LayersOption = Annotated[
    str | None, typer.Option("--layers", help="Transformer blocks to adapt, e.g. 0-3,8; all if not given.")
]
CheckBase = Annotated[
    bool, typer.Option("--check-base/--any-base", help="Refuse adapters that were made for another base.")
]
Head = Annotated[
    str, typer.Option("--task", help="Head: auto (the config's), causal-lm, sequence-classification or features.")
]
Dtype = Annotated[str, typer.Option("--dtype", help="Dtype of the base in memory: auto, float32, bfloat16, float16.")]

_WEIGHTED = re.compile(r"(?P<path>.+):(?P<weight>[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?)", re.IGNORECASE)


def key_values(texts: Sequence[str] | None, flag: str = "--option") -> dict[str, Any]:
    """Return ``KEY=VALUE`` texts as data; values are read as YAML, so numbers, booleans and lists work.

    Raises
    ------
    OptionError
        A text without ``=``, a key given twice, or a value that is not YAML.
    """
    import yaml

    values: dict[str, Any] = {}
    for text in texts or ():
        key, found, raw = text.partition("=")
        key = key.strip().replace("-", "_")
        if not found or not key:
            raise OptionError(f"{flag} expects KEY=VALUE, found {text!r}.")
        if key in values:
            raise OptionError(f"{flag} {key} is given twice.")
        try:
            value = yaml.safe_load(raw)
        except yaml.YAMLError as error:
            raise OptionError(f"{flag} {key}: cannot read {raw!r} as a value.") from error
        values[key] = number(value)
    return values


def number(value: Any) -> Any:
    """Return a number for text such as ``5e-3``, which YAML takes for a word."""
    if isinstance(value, str) and re.fullmatch(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+", value):
        return float(value)
    return value


def names(texts: Sequence[str] | None) -> list[str]:
    """Return names that were given one by one or separated by commas; a regex keeps its commas."""
    split = [[t] if t.startswith("re:") else t.split(",") for t in texts or ()]
    return [name.strip() for parts in split for name in parts if name.strip()]


def layers(text: str | None) -> list[int] | None:
    """Return the numbers that ``0-3,8`` means."""
    if text is None:
        return None
    chosen: list[int] = []
    for part in text.split(","):
        found = re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", part)
        if not found or (found[2] and int(found[2]) < int(found[1])):
            raise OptionError(f"--layers expects numbers and ranges such as 0-3,8; found {text!r}.")
        chosen += range(int(found[1]), int(found[2] or found[1]) + 1)
    return chosen


def site_selection(
    targets: Sequence[str] | None, exclude: Sequence[str] | None, layer_text: str | None
) -> dict[str, Any]:
    """Return the three options that choose sites, as the library takes them."""
    return {
        "targets": names(targets) or "all-linear",
        "exclude": names(exclude),
        "layers": layers(layer_text),
    }


def adapter_reference(text: str) -> tuple[str, Path, float]:
    """Return name, path and weight of ``[NAME=]PATH[:WEIGHT]``; the name is the folder's if not given.

    In place of a path, ``OWNER/NAME`` or ``OWNER/NAME@REVISION`` on the hub.

    Raises
    ------
    OptionError
        The path does not exist.
    """
    name, found, rest = text.partition("=")
    if not found or Path(text).exists():
        name, rest = "", text
    path, weight = Path(rest).expanduser(), 1.0
    weighted = _WEIGHTED.fullmatch(rest)
    if weighted and not path.exists():
        path, weight = Path(weighted["path"]).expanduser(), float(weighted["weight"])
    stem = path.resolve().name if path.is_dir() else path.stem
    if not path.exists():
        stem, path = repository(str(path)).rpartition("/")[2], adapter_path(str(path), text)
    return name or re.sub(r"[^A-Za-z0-9_.\-]+", "-", stem).strip("-.") or "adapter", path, weight


def adapter_path(path: str, given: str | None = None) -> Path:
    """Return where an adapter lies: a path, or a place in the hub's cache (``OWNER/NAME``, ``OWNER/NAME@REVISION``).

    Raises
    ------
    OptionError
        Nothing is there; `given` is what the user wrote, if that is more than the path.
    CheckpointError
        A name on the hub that cannot be fetched.
    """
    there = Path(path).expanduser()
    if there.exists():
        return there
    if "/" in path and is_hub_name(path):
        return from_hub(path, "adapter")
    raise OptionError(
        f"There is no adapter at {there}. Expected a folder, a file or OWNER/NAME on the hub, written "
        f"[NAME=]PATH[:WEIGHT], found {given or path!r}."
    )


def adapter_references(texts: Sequence[str] | None) -> dict[str, tuple[Path, float]]:
    """Return several references by name.

    Raises
    ------
    OptionError
        Two of them have one name.
    """
    found: dict[str, tuple[Path, float]] = {}
    for text in texts or ():
        name, path, weight = adapter_reference(text)
        if name in found:
            raise OptionError(f"Two adapters are called '{name}'; name them: --adapter NAME={path}.")
        found[name] = (path, weight)
    return found
