"""Saving an adapter: one folder, in PEFT's format too wherever that is exact, written in one step."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lorry.core.errors import CheckpointError, OptionError, near_misses
from lorry.core.life.adapter import Adapter
from lorry.core.life.writers import WRITERS
from lorry.core.method.declared import whole_module
from lorry.core.method.families import Bottleneck
from lorry.core.receipt import Receipt
from lorry.core.sites.fingerprint import Fingerprint
from lorry.formats.file import FOLDER_FORMATS, AdapterFile
from lorry.formats.folders import MANIFEST, PEFT_CONFIG, TENSORS, write_folder
from lorry.formats.manifest import Manifest, Section
from lorry.formats.peft_write import NotPlain, PeftFolder, Plain, peft_folder
from lorry.formats.snapshot import as_file, is_sharded
from lorry.formats.stored import PREFIX
from lorry.formats.tensors import check_finite, checksum, places_of, with_metadata
from lorry.formats.updates import NeedsBase


def save_adapter(
    adapter: Adapter | AdapterFile,
    path: str | os.PathLike[str],
    *,
    overwrite: bool = True,
    format: str = "auto",
    base_name: str | None = None,
    extra: Mapping[str, bytes] | None = None,
    **options: Any,
) -> Receipt:
    """Write an adapter as a folder: ``adapter_model.safetensors``, ``lorry.json``, and
    ``adapter_config.json`` where exact.

    Sharded tensors (FSDP2) are gathered first, so every process must call this then; only the first one
    writes. A kill at any moment leaves the old folder whole, or the new one.

    Parameters
    ----------
    adapter
        Attached to a model (merged or not, training or not), or as data.
    path
        The folder.
    overwrite
        Replace an adapter that lies there; other files in the folder are kept.
    format
        ``auto`` uses PEFT's names and config whenever PEFT computes exactly the same, ``peft`` insists on it,
        ``lorry`` leaves them out; any other name is that of a writer in `lorry.core.life.writers.WRITERS`.
    base_name
        What PEFT should load as the base; the model's own name if not given.
    extra
        Further files of the folder, by name.
    options
        Of another writer.

    Raises
    ------
    CheckpointError
        A tensor is empty or not finite, the format cannot say it, or the disk refuses; what was there before
        is left.
    """
    if format not in FOLDER_FORMATS:
        known = [*FOLDER_FORMATS, *(w for w in WRITERS if w != "folder")]
        if format not in known:
            raise OptionError(
                f"format must be one of {', '.join(known)}, found {format!r}.{near_misses(str(format), known)}"
            )
        return WRITERS.find(format)(adapter, path, overwrite=overwrite, **options)
    if options:
        raise OptionError(f"Saving as a folder has no option '{next(iter(options))}'.")
    sharded = is_sharded(adapter)
    file = as_file(adapter, copy=False)
    try:
        return _save(file, Path(path), format, base_name, overwrite, extra or {}, write=process_rank() == 0)
    finally:
        if sharded:
            torch.distributed.barrier()


WRITERS.add("folder", save_adapter)


def _save(
    file: AdapterFile,
    path: Path,
    format: str,
    base_name: str | None,
    overwrite: bool,
    extra: Mapping[str, bytes],
    *,
    write: bool,
) -> Receipt:
    if file.needs_model:
        raise NeedsBase(f"'{file.where}' cannot be written as it is: {file.needs_model}. Load it and save the adapter.")
    if file.flat:
        raise NeedsBase(
            f"'{file.where}' names its layers with underscores, which only the model can resolve. Load it onto its "
            "model and save the adapter."
        )
    if len(file.components) == 1:
        file = next(iter(file.components.values()))
    notes: list[str] = []
    form: PeftFolder | None = None
    if format != "lorry" and not file.components:
        try:
            form = adapter_form(file, base_name)
            notes += form.notes
        except NotPlain as reason:
            if format == "peft":
                raise CheckpointError(
                    f"Adapter '{file.name}' cannot be saved in PEFT's format: {reason}. Save it with "
                    "format='auto', or export it with lorry.formats.export.export_plain."
                ) from None
            notes.append(f"saved in Lorry's format only, because {reason}")
    elif format == "peft":
        raise CheckpointError(f"Adapter '{file.name}' spans several models, which PEFT's format cannot say.")
    flat, sections = contents(file) if form is None else (form.tensors, {"": section_of(file, "peft")})
    check_tensors(flat, file.name)
    if write:
        files = {} if form is None else {PEFT_CONFIG: form.config_bytes()}
        write_adapter(path, file.name, flat, sections, {**files, **extra}, overwrite=overwrite, metadata=file.metadata)
    else:
        notes.append("written by the first process")
    return Receipt("save", file.name, len(flat), len(flat), len(file.sites), "match", notes=tuple(notes))


def contents(file: AdapterFile) -> tuple[dict[str, Tensor], dict[str, Section]]:
    """Return the tensors of an adapter by the names that Lorry's layout gives them, and the manifest's sections."""
    if not file.components:
        return flat_tensors(file), {"": section_of(file, "lorry")}
    flat: dict[str, Tensor] = {}
    for root, part in file.components.items():
        if part.flat:
            raise NeedsBase(f"'{part.where}' names its layers with underscores, which only the model can resolve")
        flat |= {f"{root}/{name}": t for name, t in flat_tensors(part).items()}
    return flat, {root: section_of(part, "lorry") for root, part in file.components.items()}


def write_adapter(
    path: Path,
    name: str,
    flat: Mapping[str, Tensor],
    sections: dict[str, Section],
    files: Mapping[str, bytes],
    *,
    overwrite: bool,
    metadata: dict[str, Any],
) -> None:
    """Write tensors, manifest and further files as one folder in one step."""
    blob, digest, checksums = sealed(flat)
    dtypes = {str(t.dtype).removeprefix("torch.") for t in flat.values() if t.is_floating_point()}
    manifest = Manifest(
        name=name,
        sections=sections,
        tensors=len(flat),
        dtype=dtypes.pop() if len(dtypes) == 1 else "mixed",
        digest=digest,
        checksums=checksums,
        metadata={} if "" in sections else metadata,
    )
    write_folder(path, {TENSORS: blob, **files, MANIFEST: manifest.to_bytes()}, overwrite=overwrite)


def flat_tensors(file: AdapterFile) -> dict[str, Tensor]:
    """Return all tensors of an adapter by the names that Lorry's layout gives them."""
    shared = {n: t for n, t in file.shared_tensors().items() if n not in file.shared_unsaved}
    flat = {f"shared.{name}": tensor for name, tensor in shared.items()}
    for path, stored in file.sites.items():
        if not file.native and not stored.method.whole:
            file.facts(path)  # a bank that PEFT flattened has no shape without its model
        flat |= {f"{path}.{n}": t for n, t in saved_tensors(file, path).items()}
    for path, key in file.base_copies.items():
        flat[path] = file.read(key)
    return flat


def saved_tensors(file: AdapterFile, path: str) -> dict[str, Tensor]:
    """Return the tensors of a site that are written to a checkpoint."""
    unsaved = file.stored(path)[1].unsaved
    return {n: t for n, t in file.tensors(path).items() if n not in unsaved}


def section_of(file: AdapterFile, layout: str) -> Section:
    """Return what the manifest says of the adapter of one root."""
    facts = {p: None if s.method.whole else file.facts(p) for p, s in file.sites.items()}
    copied = {p.rpartition(".")[0]: whole_module() for p in file.base_copies}
    kinds = {p: "block" if f is None else f.kind for p, f in facts.items()}
    shapes = {p: (0, 0) if f is None else f.shape for p, f in facts.items()}
    for path, stored in file.sites.items():
        if stored.kind == "block":
            kinds[path], shapes[path] = "block", stored.shape or (0, 0)
    shared = [n for n in (file.shared | file.shared_values) if n not in file.shared_unsaved]
    return Section(
        layout=layout,
        method=file.method,
        methods={**file.methods, **copied},
        kinds={**kinds, **dict.fromkeys(copied, "block")},
        shapes={**shapes, **dict.fromkeys(copied, (0, 0))},
        shared=tuple(shared),
        kernels={p: f.kernel for p, f in facts.items() if f is not None and f.kernel and layout == "lorry"},
        fingerprint=file.fingerprint if file.fingerprint is not None else Fingerprint({}, file.base),
        metadata=file.metadata,
    )


def adapter_form(file: AdapterFile, base_name: str | None) -> PeftFolder:
    """Return the adapter in PEFT's format, or raise `NotPlain` saying why PEFT would not compute the same."""
    if file.shared or file.shared_values:
        raise NotPlain("its sites share tensors")
    low = {p: m for p, m in file.methods.items() if not m.whole}
    form = next((m.peft_form for m in low.values()), None)
    if form is None or not form.exact or any(m.peft_form != form for m in low.values()):
        slugs = sorted({m.info.slug for m in file.methods.values()})
        raise NotPlain(f"its methods are {slugs}, which PEFT's LoRA does not say, or not together")
    options: Any = low  # they have LoRA's fields, as `PeftForm` asks; `core` does not import `methods`
    stabilized = {m.rank_stabilized for m in options.values()}
    dropouts = {m.dropout for m in options.values()}
    same = len(stabilized) == 1
    plain = []
    for path, method in options.items():
        try:
            site = file.site(path)
        except NeedsBase as reason:
            raise NotPlain(str(reason)) from None
        if site.kind.name == "conv" and file.root is None and not file.facts(path).kernel:
            raise NotPlain(f"the kernel of the convolution '{path}' is not in the file")
        assert isinstance(method, Bottleneck)
        alpha = getattr(method, "rank", 0) if getattr(method, "alpha", None) is None else getattr(method, "alpha", 0)
        rank = int(getattr(method, "rank", 0))
        plain.append(Plain(site, rank, float(alpha) if same else method.scale(site) * rank, saved_tensors(file, path)))
    result = peft_folder(
        file.root,
        plain,
        {p: saved_tensors(file, p) for p in file.sites if p not in low},
        fields=form.config,
        stabilized=same and stabilized == {True},
        dropout=dropouts.pop() if len(dropouts) == 1 else 0.0,
        base=base_name if base_name is not None else model_name(file),
        task=file.metadata.get("task_type"),
        chosen=file.targets() if file.targets is not None else None,
    )
    result.tensors |= {f"{PREFIX}{path}": file.read(key) for path, key in file.base_copies.items()}
    if len(dropouts) > 1:
        result.notes.append("dropout differs by site: it is in lorry.json only")
    return result


def sealed(tensors: Mapping[str, Tensor]) -> tuple[bytes, str, dict[str, str]]:
    """Return a safetensors file that carries a digest of itself, the digest, and the checksum of each tensor."""
    from safetensors.torch import save

    whole: dict[str, Tensor] = {}
    taken: set[int] = set()
    for name, tensor in tensors.items():
        tensor = tensor.contiguous()
        storage = tensor.untyped_storage()
        shares = storage.nbytes() != tensor.numel() * tensor.element_size() or storage.data_ptr() in taken
        whole[name] = tensor.clone() if shares else tensor
        taken.add(storage.data_ptr())
    blob = save(whole)
    digest = hashlib.blake2b(blob, digest_size=8).hexdigest()
    places, start = places_of(blob)
    view = memoryview(blob)
    checksums = {n: checksum(view[start + p.start : start + p.end]) for n, p in places.items()}
    return with_metadata(blob, {"format": "pt", "lorry_digest": digest}), digest, checksums


def check_tensors(tensors: Mapping[str, Tensor], name: str) -> None:
    """Raise `CheckpointError` if a tensor is empty or not finite: such a file could not be loaded."""
    empty = [n for n, t in tensors.items() if not t.numel()]
    if empty or not tensors:
        raise CheckpointError(
            f"Adapter '{name}' has {len(empty)} empty tensors of {len(tensors)}, e.g. {empty[:1]}; nothing was "
            "written. Under sharded training every process must call save, so that the tensors can be gathered."
        )
    try:
        check_finite(tensors, name)
    except CheckpointError as error:
        raise CheckpointError(f"{error} Nothing was written.") from None


def model_name(file: AdapterFile) -> str:
    """Return where the base model of an adapter came from, or an empty string."""
    if file.root is None:
        return file.base
    config = getattr(file.root, "config", None)
    return str(getattr(config, "_name_or_path", "") or "")


def process_rank() -> int:
    """Return this process's number under torch.distributed, 0 without it."""
    ready = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_rank() if ready else 0
