"""``lorry convert``: adapters between Lorry's, PEFT's, kohya's and diffusers' formats."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lorry.cli.arguments import Json
from lorry.cli.output import out, print_json
from lorry.core.errors import CheckpointError, OptionError, near_misses

if TYPE_CHECKING:
    from lorry.formats.file import AdapterFile

GOALS = ("peft", "lorry")


def convert(
    source: Annotated[
        Path, typer.Argument(help="Adapter: a folder of Lorry's or PEFT's, or a kohya / diffusers file.")
    ],
    goal: Annotated[Path, typer.Argument(help="Folder to write.")],
    to: Annotated[str, typer.Option("--to", help="peft (peft, vLLM and diffusers load it) or lorry.")],
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
        typer.Option(min=1, help="Rank of updates that PEFT's format can only approximate; the receipt has the error."),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an adapter that is there.")] = False,
    check_base: Annotated[
        bool, typer.Option("--check-base/--any-base", help="Refuse a base that the adapter was not made for.")
    ] = True,
    as_json: Json = False,
) -> None:
    """Write an adapter in another format, exactly, or say why it cannot be."""
    from lorry.formats.reader import open_adapter

    if to not in GOALS:
        raise OptionError(f"--to must be one of {', '.join(GOALS)}, found '{to}'.{near_misses(to, GOALS)}")
    if goal.resolve() == source.resolve():
        raise OptionError("Source and goal are the same folder; choose another goal.")
    if goal.exists() and not overwrite and (goal.is_file() or any(goal.iterdir())):
        raise OptionError(f"{goal} exists already. Choose another folder, or pass --overwrite.")
    file = open_adapter(source)
    if to == "lorry" and file.format == "lorry":
        raise OptionError(f"{source} is in Lorry's format already.")
    if to == "peft" and _has_peft(file):
        receipts = [_copy(file, goal, overwrite)]
    else:
        model = _base(base, file)
        receipts = _through(model, source, goal, to, rank, overwrite, check_base)
    report = {"source": str(source), "from": file.format, "to": to, "goal": str(goal), "receipts": receipts}
    if as_json:
        print_json(report)
        return
    for receipt in receipts:
        out().print(receipt["text"], markup=False, highlight=False, soft_wrap=True)
    out().print(f"wrote {goal}", highlight=False, soft_wrap=True)


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
    from lorry.cli.bases import POCKET, load_base

    if name is None:
        if file.base != POCKET and not (file.base and (Path(file.base) / "config.json").is_file()):
            said = (
                f"the file names '{file.base}', which is no folder here" if file.base else "the file does not name it"
            )
            raise CheckpointError(
                f"Converting a {file.format} adapter of this kind needs its base: give --base DIR ({said})."
            )
        name = file.base
    return load_base(name)


def _through(
    model: Any, source: Path, goal: Path, to: str, rank: int | None, overwrite: bool, check_base: bool
) -> list[dict[str, Any]]:
    """Load the adapter onto its base and write it from there, so that every tensor is seen to fit."""
    import lorry
    from lorry.formats.export import export_plain

    loaded = lorry.load(model, source, check_base=check_base)
    if to == "peft":
        written = export_plain(loaded, goal, rank, overwrite=overwrite)
    else:
        written = loaded.save(goal, overwrite=overwrite)
    return [{**r.to_dict(), "text": str(r)} for r in (loaded.receipt, written)]
