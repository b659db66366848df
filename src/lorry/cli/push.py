"""``lorry push`` and ``lorry pull``: adapters to and from the Hugging Face hub, with a model card."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer

from lorry.cli.arguments import Json, adapter_path
from lorry.cli.hub import HUB_ERRORS, is_hub_name, why_not
from lorry.cli.output import note, out, print_json
from lorry.core.errors import CheckpointError, OptionError

#: What a folder of an adapter consists of; nothing else goes to the hub.
_ENDINGS = (".safetensors", ".json")


def push(
    adapter: Annotated[str, typer.Argument(help="Folder of an adapter.")],
    repo: Annotated[
        str | None, typer.Argument(help="OWNER/NAME on the hub; made if it is not there. Needs `hf auth login`.")
    ] = None,
    to: Annotated[
        Path | None, typer.Option("--to", help="Write what would be uploaded into this folder; needs no network.")
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch to upload to; main if not given.")] = None,
    message: Annotated[str | None, typer.Option(help="Commit message.")] = None,
    licence: Annotated[
        str | None, typer.Option("--license", help="Licence for the card, as the hub spells it, e.g. apache-2.0.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an adapter in the folder of --to.")] = False,
    as_json: Json = False,
) -> None:
    """Upload an adapter to the hub with a model card (metrics, base, receipt), or write the same into a folder."""
    if (repo is None) == (to is None):
        raise OptionError("Give a repository OWNER/NAME to upload to, or --to FOLDER to write to; one of them.")
    name = repo or (to.name if to is not None else "")
    if to is not None:
        report = stage(adapter_path(adapter), to, name, licence, overwrite)
        where = str(to)
    else:
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary) / "adapter"
            report = stage(adapter_path(adapter), folder, name, licence, False)
            where = _upload(folder, name, private, revision, message or f"Upload {report['receipt']['adapter']}")
    if as_json:
        print_json({**report, "to": where})
        return
    note(report["text"])
    out().print(f"wrote {where}", highlight=False, soft_wrap=True)


def pull(
    repo: Annotated[
        str, typer.Argument(help="OWNER/NAME or OWNER/NAME@REVISION on the hub, or a folder of `push --to`.")
    ],
    folder: Annotated[Path, typer.Argument(help="Folder to write; must not hold an adapter.")],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an adapter that is there.")] = False,
    as_json: Json = False,
) -> None:
    """Fetch an adapter from the hub into a folder, and check every tensor of it."""
    source = adapter_path(repo)
    report = copied(source, folder, {}, overwrite)
    if as_json:
        print_json({**report, "from": repo, "to": str(folder)})
        return
    note(report["text"])
    out().print(f"wrote {folder}", highlight=False, soft_wrap=True)


def stage(source: Path, folder: Path, name: str, licence: str | None, overwrite: bool) -> dict[str, Any]:
    """Write an adapter and its card into a folder, in the layout of the hub; returns the receipt as data."""
    from lorry.cli.card import model_card
    from lorry.formats.reader import open_adapter

    file = open_adapter(source)
    card = model_card(file, name, licence)
    return copied(source, folder, {"README.md": card.encode()}, overwrite)


def copied(source: Path, folder: Path, more: dict[str, bytes], overwrite: bool) -> dict[str, Any]:
    """Copy the files of an adapter byte for byte, and read every tensor of the copy.

    Raises
    ------
    CheckpointError
        The source is no folder or is damaged, or the goal exists and must not be replaced.
    """
    from lorry.core.receipt import Receipt
    from lorry.formats.folders import write_folder
    from lorry.formats.reader import open_adapter

    if not source.is_dir():
        raise CheckpointError(
            f"{source} is a single file, and the hub's adapters are folders; `lorry convert {source} DIR --to peft` "
            "makes one of it."
        )
    if source.resolve() == folder.resolve():
        raise OptionError("Source and goal are the same folder; choose another goal.")
    open_adapter(source).read_all()  # before anything is written
    files = {p.name: p.read_bytes() for p in sorted(source.iterdir()) if p.is_file() and p.suffix in _ENDINGS}
    readme = source / "README.md"
    files |= {"README.md": readme.read_bytes()} if readme.is_file() else {}
    write_folder(folder, {**files, **more}, overwrite=overwrite)
    copy = open_adapter(folder)
    copy.read_all()
    receipt = Receipt("copy", copy.name, copy.tensor_count, copy.tensor_count, len(copy.sites))
    text = (
        f"'{copy.name}': {copy.tensor_count} tensors at {len(copy.sites)} sites taken over byte for byte and read back"
    )
    return {"receipt": receipt.to_dict(), "files": sorted({**files, **more}), "text": text}


def _upload(folder: Path, repo: str, private: bool, revision: str | None, message: str) -> str:
    """Upload a folder; returns where it is now."""
    from huggingface_hub import HfApi

    if not is_hub_name(repo) or "/" not in repo or "@" in repo:
        raise OptionError(f"Expected OWNER/NAME on the hub, found {repo!r}; --to FOLDER writes to a folder.")
    api = HfApi()
    try:
        api.create_repo(repo, private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(repo, branch=revision, exist_ok=True)
        api.upload_folder(repo_id=repo, folder_path=folder, revision=revision, commit_message=message)
    except HUB_ERRORS as error:
        raise CheckpointError(
            f"Cannot upload to {repo}: {why_not(error)}. `lorry push ADAPTER --to FOLDER` writes the same without a "
            f"network, and `hf upload {repo} FOLDER` uploads it later."
        ) from error
    return f"https://huggingface.co/{repo}" + (f"/tree/{revision}" if revision else "")
