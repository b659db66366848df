"""Saving an adapter: one folder, in PEFT's format too wherever that is exact, written in one step."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from lorry.core.errors import CheckpointError, OptionError, near_misses
from lorry.core.life.writers import WRITERS
from lorry.core.receipt import Receipt
from lorry.formats.folders import MANIFEST, PEFT_CONFIG, TENSORS, write_folder
from lorry.formats.manifest import Manifest
from lorry.formats.peft_write import NotPlain, PeftForm, Plain, peft_form
from lorry.formats.tensors import check_finite, with_metadata

if TYPE_CHECKING:
    from lorry.core.life.adapter import Adapter

SaveFormat = Literal["auto", "peft", "lorry"]


def save_adapter(
    adapter: Adapter,
    path: str | os.PathLike[str],
    *,
    overwrite: bool = True,
    format: SaveFormat = "auto",
    base_name: str | None = None,
) -> Receipt:
    """Write an adapter as a folder: ``adapter_model.safetensors``, ``lorry.json``, and
    ``adapter_config.json`` where exact.

    Sharded tensors (FSDP2) are gathered first, so every process must call this then; only the first one
    writes. A kill at any moment leaves the old folder whole, or the new one.

    Parameters
    ----------
    adapter
        Attached to a model; merged or not, training or not.
    path
        The folder.
    overwrite
        Replace an adapter that lies there; other files in the folder are kept.
    format
        ``auto`` uses PEFT's names and config whenever PEFT computes exactly the same, ``peft`` insists on it,
        ``lorry`` leaves them out.
    base_name
        What PEFT should load as the base; the model's own name if not given.

    Raises
    ------
    CheckpointError
        A tensor is empty or not finite, the format cannot say it, or the disk refuses; what was there before
        is left.
    """
    if format not in ("auto", "peft", "lorry"):
        raise OptionError(
            "format must be auto, peft or lorry, found "
            f"{format!r}.{near_misses(str(format), ['auto', 'peft', 'lorry'])}"
        )
    tensors, sharded = gathered(adapter)
    first = process_rank() == 0
    try:
        receipt = _save(adapter, Path(path), tensors, format, base_name, overwrite, write=first)
    finally:
        if sharded:
            torch.distributed.barrier()
    return receipt


WRITERS.add("folder", save_adapter)


def _save(
    adapter: Adapter,
    path: Path,
    tensors: dict[str, dict[str, Tensor]],
    format: SaveFormat,
    base_name: str | None,
    overwrite: bool,
    *,
    write: bool,
) -> Receipt:
    notes: list[str] = []
    form: PeftForm | None = None
    if format != "lorry":
        try:
            form = adapter_form(adapter, tensors, base_name)
            notes += form.notes
        except NotPlain as reason:
            if format == "peft":
                raise CheckpointError(
                    f"Adapter '{adapter.name}' cannot be saved in PEFT's format: {reason}. Save it with "
                    "format='auto', or export it with lorry.formats.export.export_plain."
                ) from None
            notes.append(f"saved in Lorry's format only, because {reason}")
    flat = form.tensors if form else {f"{home}.{n}": t for home, own in tensors.items() for n, t in own.items()}
    check_tensors(flat, adapter.name)
    if write:
        blob, digest = serialised(flat)
        files = {TENSORS: blob}
        if form:
            files[PEFT_CONFIG] = form.config_bytes()
        files[MANIFEST] = _manifest(adapter, len(flat), "peft" if form else "lorry", tensors, digest).to_bytes()
        write_folder(path, files, overwrite=overwrite)
    else:
        notes.append("written by the first process")
    return Receipt("save", adapter.name, len(flat), len(flat), len(adapter.entries), "match", notes=tuple(notes))


def gathered(adapter: Adapter) -> tuple[dict[str, dict[str, Tensor]], bool]:
    """Return all saved tensors by home and name, whole and on the CPU, and whether any was sharded."""
    result: dict[str, dict[str, Tensor]] = {}
    sharded = False
    with torch.no_grad():
        for home, holder in adapter.homes():
            own = {}
            for name, tensor in holder.tensors().items():
                if not holder.specs[name].saved:
                    continue
                if hasattr(tensor, "full_tensor"):
                    sharded = True
                    tensor = tensor.full_tensor()
                own[name] = tensor.detach().to("cpu")
            result[home] = own
    return result, sharded


def adapter_form(adapter: Adapter, tensors: dict[str, dict[str, Tensor]], base_name: str | None) -> PeftForm:
    """Return the adapter in PEFT's format, or raise `NotPlain` saying why PEFT would not compute the same."""
    if adapter.shared is not None:
        raise NotPlain("its sites share tensors")
    low = {p: e.method for p, e in adapter.entries.items() if e.method.info.slug != "full"}
    slugs = {m.info.slug for m in low.values()}
    if not low or not slugs <= {"lora", "dora"} or len(slugs) > 1:
        raise NotPlain(
            f"its methods are {sorted({e.method.info.slug for e in adapter.entries.values()})}, not LoRA or DoRA alone"
        )
    options: Any = low  # LoRA's fields, which DoRA has too; `core` does not import `methods`
    stabilized = {m.rank_stabilized for m in options.values()}
    dropouts = {m.dropout for m in options.values()}
    same = len(stabilized) == 1
    plain = []
    for path, method in options.items():
        site = adapter.entries[path].site
        alpha = method.rank if method.alpha is None else method.alpha
        alpha = float(alpha) if same else method.scale(site) * method.rank
        plain.append(Plain(site, method.rank, alpha, tensors[path]))
    whole = {p: tensors[p] for p in adapter.entries if p not in low}
    form = peft_form(
        adapter.state.root,
        plain,
        whole,
        dora=slugs == {"dora"},
        stabilized=same and stabilized == {True},
        dropout=dropouts.pop() if len(dropouts) == 1 else 0.0,
        base=base_name if base_name is not None else model_name(adapter),
        task=adapter.metadata.get("task_type"),
    )
    if len(dropouts) > 1:
        form.notes.append("dropout differs by site: it is in lorry.json only")
    return form


def serialised(tensors: dict[str, Tensor]) -> tuple[bytes, str]:
    """Return a safetensors file that carries a digest of itself, and the digest."""
    from safetensors.torch import save

    whole = {}
    for name, tensor in tensors.items():
        tensor = tensor.contiguous()
        shares = tensor.untyped_storage().nbytes() != tensor.numel() * tensor.element_size()
        whole[name] = tensor.clone() if shares else tensor
    blob = save(whole)
    digest = hashlib.blake2b(blob, digest_size=8).hexdigest()
    return with_metadata(blob, {"format": "pt", "lorry_digest": digest}), digest


def check_tensors(tensors: dict[str, Tensor], name: str) -> None:
    """Raise `CheckpointError` if a tensor is empty or not finite: such a file could not be loaded."""
    empty = [n for n, t in tensors.items() if not t.numel()]
    if empty or not tensors:
        raise CheckpointError(
            f"Adapter '{name}' has {len(empty)} empty tensors of {len(tensors)}, e.g. {empty[:1]}; nothing "
            "was written. Under sharded training every process must call save, so that the tensors can be "
            "gathered."
        )
    try:
        check_finite(tensors, name)
    except CheckpointError as error:
        raise CheckpointError(f"{error} Nothing was written.") from None


def _manifest(
    adapter: Adapter, count: int, layout: str, tensors: dict[str, dict[str, Tensor]], digest: str
) -> Manifest:
    kinds = {
        str(t.dtype).removeprefix("torch.") for own in tensors.values() for t in own.values() if t.is_floating_point()
    }
    entries = adapter.entries
    return Manifest(
        name=adapter.name,
        layout=layout,
        method=adapter.method,
        methods={p: e.method for p, e in entries.items()},
        kinds={p: e.site.kind.name for p, e in entries.items()},
        shapes={p: e.site.shape for p, e in entries.items()},
        shared=tuple(tensors.get("shared", {})),
        tensors=count,
        dtype=kinds.pop() if len(kinds) == 1 else "mixed",
        fingerprint=adapter.fingerprint,
        metadata=adapter.metadata,
        digest=digest,
    )


def model_name(adapter: Adapter) -> str:
    """Return where the adapter's base model came from, or an empty string."""
    config = getattr(adapter.state.root, "config", None)
    return str(getattr(config, "_name_or_path", "") or "")


def process_rank() -> int:
    """Return this process's number under torch.distributed, 0 without it."""
    ready = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_rank() if ready else 0
