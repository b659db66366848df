"""``lorry convert``: adapters between formats; every writer that is registered is a goal."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lorry.cli.arguments import Json, adapter_path, key_values
from lorry.cli.hub import is_hub_name
from lorry.cli.output import out, print_json
from lorry.core.errors import CheckpointError, OptionError, near_misses

if TYPE_CHECKING:
    from lorry.formats.file import AdapterFile

#: Goals that are one folder of `save_adapter`; every other one is the name of a writer.
FOLDERS = ("peft", "lorry")
#: Arguments of writers that have flags of their own here.
_FLAGS = ("overwrite", "rank", "config")


def goals() -> list[str]:
    """Return what --to may be."""
    from lorry.core.life.writers import WRITERS

    return [*FOLDERS, *(name for name in WRITERS if name != "folder")]


def convert(
    adapter: Annotated[
        str,
        typer.Argument(
            metavar="ADAPTER",
            help="A folder of Lorry's or PEFT's, a kohya / diffusers file, or a name on the hub (OWNER/NAME@REVISION).",
        ),
    ],
    goal: Annotated[Path, typer.Argument(help="Folder or file to write.")],
    to: Annotated[
        str,
        typer.Option(
            "--to",
            help="peft, lorry, gguf (llama.cpp), ollama, vllm, kohya, diffusers, or plain (PEFT's format, whatever the "
            "method).",
        ),
    ],
    base: Annotated[
        str | None,
        typer.Option(
            "--base",
            "-b",
            help="The model it was made for, where names, sites or fingerprint depend on it; the one that "
            "the file names if not given.",
        ),
    ] = None,
    rank: Annotated[
        int | None,
        typer.Option(min=1, help="Rank of updates that the goal can only approximate; the receipt has the error."),
    ] = None,
    option: Annotated[
        list[str] | None,
        typer.Option(
            "--option", "-o", metavar="KEY=VALUE", help="An option of the goal, such as dtype=float16; repeatable."
        ),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is there.")] = False,
    check_base: Annotated[
        bool, typer.Option("--check-base/--any-base", help="Refuse a base that the adapter was not made for.")
    ] = True,
    as_json: Json = False,
) -> None:
    """Write an adapter in another format, exactly, or say why it cannot be; and print how it is used."""
    from lorry.formats.reader import open_adapter

    source = adapter_path(adapter)
    options = _options(to, option, rank)
    _check_goal(goal, source, overwrite)
    file = open_adapter(source)
    if to == "lorry" and file.format == "lorry":
        raise OptionError(f"{source} is in Lorry's format already.")
    if to == "peft" and _has_peft(file):
        receipts = [_copy(file, goal, overwrite)]
    elif to in FOLDERS:
        receipts = _through(_base(base, file), source, goal, to, options, overwrite, check_base)
    else:
        receipts = _written(file, base, source, goal, to, options, overwrite, check_base)
    report = {"source": str(source), "from": file.format, "to": to, "goal": str(goal), "receipts": receipts}
    _show(report, _commands(to, goal, base, file), as_json)


def _show(report: dict[str, Any], commands: list[str], as_json: bool) -> None:
    if as_json:
        print_json({**report, "commands": commands})
        return
    for receipt in report["receipts"]:
        out().print(receipt["text"], markup=False, highlight=False, soft_wrap=True)
    out().print(f"wrote {report['goal']}", highlight=False, soft_wrap=True)
    for line in commands:
        out().print(f"  $ {line}", markup=False, highlight=False, soft_wrap=True)


def _commands(to: str, goal: Path, base: str | None, file: AdapterFile) -> list[str]:
    """Return what uses the adapter that was written."""
    from lorry.cli.bases import POCKET, folder_of
    from lorry.formats.uses import Exported, commands

    name = _named_base(base, file)
    called = str(folder_of(name)) if name == POCKET and to != "lorry" else name or file.base or "BASE"
    return commands(to, Exported(goal, called, file.name))


def _options(to: str, texts: list[str] | None, rank: int | None) -> dict[str, Any]:
    """Return the options of a goal, checked."""
    from lorry.core.life.writers import WRITERS

    known = goals()
    if to not in known:
        raise OptionError(f"--to must be one of {', '.join(known)}, found '{to}'.{near_misses(to, known)}")
    options = key_values(texts)
    accepted: list[str] = []
    if to not in FOLDERS:
        accepted = [n for n, p in inspect.signature(WRITERS[to]).parameters.items() if n not in ("adapter", "path")]
    for name in options:
        free = [n for n in accepted if n not in _FLAGS]
        if name not in free:
            there = f" It has: {', '.join(free)}." if free else ""
            raise OptionError(f"'{to}' has no option '{name}'.{near_misses(name, free)}{there}")
    if rank is not None and (to == "peft" or "rank" in accepted):
        options["rank"] = rank
    return options


def _written(
    file: AdapterFile,
    base: str | None,
    source: Path,
    goal: Path,
    to: str,
    options: dict[str, Any],
    overwrite: bool,
    check_base: bool,
) -> list[dict[str, Any]]:
    """Write from the file alone where that suffices, else from the adapter on its base."""
    from lorry.cli.bases import folder_of
    from lorry.core.life.writers import WRITERS
    from lorry.formats.updates import NeedsBase

    writer = WRITERS[to]
    named = _named_base(base, file)
    if "config" in inspect.signature(writer).parameters and named is not None:
        options = {**options, "config": folder_of(named)}
    if base is not None and check_base and not file.flat and not file.needs_model:
        _check_places(file, base)
    try:
        receipt = writer(file, goal, overwrite=overwrite, **options)
    except NeedsBase:
        return _through(_base(base, file), source, goal, to, options, overwrite, check_base)
    return [{**receipt.to_dict(), "text": str(receipt)}]


def _check_places(file: AdapterFile, base: str) -> None:
    """Refuse a base that lacks a site of the adapter, or has it in another shape; reads no weights."""
    from lorry.cli.bases import skeleton
    from lorry.core.life.plan import plan

    paths = [p for p, s in file.sites.items() if not s.method.whole and not s.component]
    if not paths:
        return
    there = {site.path: site.shape for site in plan(skeleton(base), "lora", targets=paths).sites}
    for path in paths:
        wanted = tuple(file.facts(path).shape)
        if there.get(path) != wanted:
            found = f"has it with {there[path]}" if path in there else "has no such site"
            raise CheckpointError(
                f"The adapter sits on '{path}' with (out, in) = {wanted}, and the base '{base}' {found}. Give the base "
                "that it was made for."
            )


def _check_goal(goal: Path, source: Path, overwrite: bool) -> None:
    if goal.resolve() == source.resolve():
        raise OptionError("Source and goal are the same folder; choose another goal.")
    if goal.exists() and not overwrite and (goal.is_file() or any(goal.iterdir())):
        raise OptionError(f"{goal} exists already. Choose another folder, or pass --overwrite.")


def _named_base(base: str | None, file: AdapterFile) -> str | None:
    """Return the base that was given, or the one that the file names if it is here; None otherwise."""
    from lorry.cli.bases import POCKET

    if base is not None:
        return base
    return file.base if file.base == POCKET or (file.base and (Path(file.base) / "config.json").is_file()) else None


def _has_peft(file: AdapterFile) -> bool:
    from lorry.formats.folders import PEFT_CONFIG

    folder = file.path is not None and file.path.is_dir() and (file.path / PEFT_CONFIG).is_file()
    return file.layout == "peft" and folder


def _copy(file: AdapterFile, goal: Path, overwrite: bool) -> dict[str, Any]:
    """Take over tensors and configuration as they are: the folder is PEFT's too."""
    from lorry.formats.folders import PEFT_CONFIG, TENSORS, write_folder

    assert file.path is not None
    write_folder(goal, {n: (file.path / n).read_bytes() for n in (TENSORS, PEFT_CONFIG)}, overwrite=overwrite)
    count = file.tensor_count
    text = f"convert '{file.name}': {count} tensors of {len(file.sites)} sites taken over byte for byte"
    return {
        "action": "convert",
        "adapter": file.name,
        "tensors_applied": count,
        "tensors_total": count,
        "text": text,
    }


def _base(name: str | None, file: AdapterFile) -> Any:
    from lorry.cli.bases import load_base

    found = _named_base(name, file) or (file.base if "/" in file.base and is_hub_name(file.base) else None)
    if found is None:
        said = f"the file names '{file.base}', which is no folder here" if file.base else "the file does not name it"
        raise CheckpointError(
            f"Converting a {file.format} adapter of this kind needs its base: give --base DIR ({said})."
        )
    return load_base(found)


def _through(
    model: Any, source: Path, goal: Path, to: str, options: dict[str, Any], overwrite: bool, check_base: bool
) -> list[dict[str, Any]]:
    """Load the adapter onto its base and write it from there, so that every tensor is seen to fit."""
    import lorry
    from lorry.core.life.writers import WRITERS

    loaded = lorry.load(model, source, check_base=check_base)
    if to == "lorry":
        written = loaded.save(goal, overwrite=overwrite)
    else:
        written = WRITERS["plain" if to == "peft" else to](loaded, goal, overwrite=overwrite, **options)
    return [{**r.to_dict(), "text": str(r)} for r in (loaded.receipt, written)]
