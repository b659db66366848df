"""``lorry fuse``: adapters into a base, written as a whole model."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Annotated, Any

import typer

from lorry.cli.arguments import CheckBase, Dtype, Head, Json, adapter_references
from lorry.cli.output import note, out, print_json
from lorry.core.errors import CheckpointError, OptionError

RECEIPT = "lorry_fuse.json"
#: What the receipt was called; a folder with it may be replaced, too.
_FORMER = "lorry_merge.json"


def fuse(
    base: Annotated[str, typer.Argument(help="'pocket', a local model folder, or a name on the hub.")],
    adapter: Annotated[
        list[str] | None,
        typer.Option("--adapter", "-a", metavar="[NAME=]DIR", help="Adapter to fuse, in this order; repeatable."),
    ] = None,
    to: Annotated[Path | None, typer.Option("--out", help="Folder for the model; must not exist.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the folder if it exists.")] = False,
    check_base: CheckBase = True,
    dtype: Dtype = "auto",
    task: Head = "auto",
    as_json: Json = False,
) -> None:
    """Put adapters into a base and save the whole model, with a receipt of every step."""
    into_base(base, adapter, to, overwrite, check_base, dtype, task, as_json)


def into_base(
    source: str,
    adapter: list[str] | None,
    to: Path | None,
    overwrite: bool,
    check_base: bool,
    dtype: str,
    task: str,
    as_json: bool,
) -> None:
    """Fuse adapters into a base and write the model."""
    from lorry.cli.bases import folder_of

    references = adapter_references(adapter)
    if not references or to is None:
        raise OptionError("Fusing needs at least one --adapter DIR and --out DIR.")
    scaled = [name for name, (_, weight) in references.items() if weight != 1]
    if scaled:
        raise OptionError(
            f"Adapter '{scaled[0]}' is given a weight; adapters are fused into a base whole, with weight 1."
        )
    if to.exists() and not overwrite:
        raise OptionError(f"{to} exists already. Choose another folder, or pass --overwrite.")
    if to.exists() and (
        not any((to / name).is_file() for name in (RECEIPT, _FORMER)) or to.resolve() == folder_of(source).resolve()
    ):
        raise CheckpointError(f"{to} was not written by `lorry fuse`, or is the base itself; it is not replaced.")
    report = fuse_into(source, {n: p for n, (p, _) in references.items()}, to, dtype, task, check_base)
    if as_json:
        print_json(report)
        return
    for line in report["text"]:
        out().print(line, highlight=False, markup=False, soft_wrap=True)
    out().print(f"wrote {to} ({report['parameters']:,} parameters)", highlight=False, soft_wrap=True)


def fuse_into(
    base: str,
    adapters: dict[str, Path],
    to: Path,
    dtype: str = "auto",
    task: str = "auto",
    check_base: bool = True,
) -> dict[str, Any]:
    """Fuse adapters into a base, write model, tokenizer and receipt to `to`, and return the receipt
    as plain data.
    """
    import lorry
    from lorry.cli.bases import folder_of, load_base

    model = load_base(base, dtype, task)
    receipts = []
    untied: list[str] = []
    for name, path in adapters.items():
        loaded = lorry.load(model, path, name=name, check_base=check_base)
        note(str(loaded.receipt))
        untied += [site.path for site in loaded.sites if site.tied]
        receipts.append(loaded.fuse())
    if untied:
        untie(model)
        note(f"the fused weight of {', '.join(dict.fromkeys(untied))} is no longer tied; the config says so")
    report = {
        "base": base,
        "adapters": {name: str(path) for name, path in adapters.items()},
        "out": str(to),
        "parameters": sum(p.numel() for p in model.parameters()),
        "untied": sorted(set(untied)),
        "receipts": [r.to_dict() for r in receipts],
        "text": [str(r) for r in receipts],
    }
    _write(model, folder_of(base), to, report)
    return report


def untie(model: Any) -> None:
    """Let the configuration say that input and output embeddings differ, so that loading does not tie
    them again.
    """
    for config in {id(c): c for c in (model.config, model.config.get_text_config())}.values():
        if getattr(config, "tie_word_embeddings", False):
            config.tie_word_embeddings = False


def _write(model: Any, base: Path, to: Path, report: dict[str, Any]) -> None:
    """Write everything beside the goal, then move it there in one step."""
    to.parent.mkdir(parents=True, exist_ok=True)
    temporary, old = (to.with_name(f".{to.name}.{os.getpid()}.{kind}") for kind in ("new", "old"))
    try:
        model.save_pretrained(temporary)
        _copy_tokenizer(base, temporary)
        (temporary / RECEIPT).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        if to.exists():
            to.rename(old)
        temporary.rename(to)
    finally:
        if old.exists() and not to.exists():
            old.rename(to)
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def _copy_tokenizer(base: Path, to: Path) -> None:
    """Take over the files of the tokenizer and of processors as they are."""
    for pattern in (
        "tokenizer*",
        "special_tokens_map.json",
        "vocab*",
        "merges.txt",
        "*processor*.json",
        "chat_template*",
        "*.model",
    ):
        for file in base.glob(pattern):
            if file.is_file() and not (to / file.name).exists():
                shutil.copyfile(file, to / file.name)
