"""Opening an adapter file without a model: method, sites, ranks, base, and its tensors one site at a time."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from lorry.core.errors import CheckpointError, near_misses, some
from lorry.core.method.base import Method
from lorry.core.method.registry import method_from
from lorry.core.sites.fingerprint import Fingerprint
from lorry.formats.folders import MANIFEST, PEFT_CONFIG, TENSORS, inside, located
from lorry.formats.manifest import Manifest, read_manifest
from lorry.formats.parts import (
    OUT_PROJ_TIMES,
    Part,
    PeftKeys,
    canonical,
    check_complete,
    doubled_by_peft,
    peft_modules,
    sort_peft_keys,
    unfolded_mid,
)
from lorry.formats.peft_config import PeftConfig, read_peft_config
from lorry.formats.single import read_single
from lorry.formats.tensors import Loaded, TensorFile

Format = Literal["lorry", "peft", "kohya", "diffusers"]


@dataclass
class AdapterFile:
    """An adapter on disk.

    Attributes
    ----------
    path
        Folder or single file.
    format
        Whose it is. A folder of Lorry's that PEFT can load too is ``lorry``.
    name
        Under which it was saved, else the name of its folder.
    method
        The method at most of its sites.
    sites
        Site path -> what the file holds there, in the order of the model where the file tells it. Paths of
        kohya's files have underscores for dots.
    fingerprint
        Of the base it was made for; None if the file does not say.
    base
        What the base is called; may be empty.
    metadata
        Lineage and training facts.
    notes
        What the reader should know.
    """

    path: Path
    format: Format
    name: str
    method: Method
    sites: dict[str, Part]
    file: TensorFile
    fingerprint: Fingerprint | None = None
    base: str = ""
    metadata: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    shared: dict[str, str] = field(default_factory=dict)
    manifest: Manifest | None = None
    config: PeftConfig | None = None
    #: Parameters of the base that were saved along (PEFT's ``save_embedding_layers``): path -> key.
    base_copies: dict[str, str] = field(default_factory=dict)
    loaded: Loaded | None = None

    @property
    def native(self) -> bool:
        """Whether the tensors lie in Lorry's own layout already."""
        return self.manifest is not None and self.manifest.layout == "lorry"

    @property
    def ranks(self) -> dict[str, int]:
        """Rank by site path, for the sites whose method has one."""
        return {p: int(s.method.rank) for p, s in self.sites.items() if hasattr(s.method, "rank")}

    def read(self, key: str) -> Tensor:
        """Return one tensor by its name in the file, as the file lays it out."""
        return self.loaded.tensors[key] if self.loaded is not None else self.file.read(key)

    def tensors(self, path: str) -> dict[str, Tensor]:
        """Return the tensors of one site in Lorry's names and layout, reading no others.

        Raises
        ------
        CheckpointError
            There is no such site (with near misses), or the bank's number of experts is not in the file.
        """
        part = self.sites.get(path)
        if part is None:
            raise CheckpointError(f"'{self.path}' has no site '{path}'.{near_misses(path, self.sites)}")
        lead = part.shape[:-2] if part.shape is not None else ()
        return self.site_tensors(part, part.kind, lead)

    def site_tensors(self, part: Part, kind: str | None, lead: tuple[int, ...]) -> dict[str, Tensor]:
        """Return the tensors of a part, given what is known of the site."""
        values = {name: self.read(key) for name, key in part.keys.items()}
        if self.native or part.kind == "block":
            return values
        if doubled_by_peft(part.path, kind):
            values["B"] = values["B"] * OUT_PROJ_TIMES
        mid = values.pop("mid", None)
        if mid is not None:
            values["A"] = unfolded_mid(values["A"], mid)
        for name, value in values.items():
            if value.ndim > 2 or lead:
                values[name] = canonical(name, value, kind, lead)
        return values


def read_info(path: str | os.PathLike[str], *, eager: bool = False) -> AdapterFile:
    """Open an adapter: Lorry's or PEFT's folder, or a single file of kohya's or diffusers' naming.

    Parameters
    ----------
    path
        Folder, or ``.safetensors`` file.
    eager
        Read all tensors now, in one go, instead of each when it is asked for.

    Raises
    ------
    CheckpointError
        It is missing, damaged, unsafe, or holds what Lorry does not understand; each with its own message.
    """
    place = located(path)
    if place.is_file():
        return _single(place, eager)
    tensors = inside(place, TENSORS)
    assert tensors is not None
    file = TensorFile(tensors)
    loaded = file.load() if eager else None
    manifest = inside(place, MANIFEST)
    if manifest is not None:
        return _own(place, read_manifest(manifest), file, loaded)
    config = inside(place, PEFT_CONFIG)
    assert config is not None
    return _peft(place, read_peft_config(config), file, loaded)


def _own(path: Path, manifest: Manifest, file: TensorFile, loaded: Loaded | None) -> AdapterFile:
    if manifest.digest != file.metadata.get("lorry_digest", ""):
        raise CheckpointError(
            f"'{path / MANIFEST}' was not written with the tensors beside it: a save was interrupted, or "
            f"another tool replaced the tensors. Save the adapter again, or remove {MANIFEST} to read the "
            "folder as PEFT's."
        )
    if manifest.tensors != len(file.places):
        raise CheckpointError(f"'{file.path}' holds {len(file.places)} tensors, its manifest names {manifest.tensors}.")
    parts = {p: Part(p, m, kind=manifest.kinds[p], shape=manifest.shapes[p]) for p, m in manifest.methods.items()}
    shared = {name: f"shared.{name}" for name in manifest.shared}
    if manifest.layout == "peft":
        surplus = _assign_peft(parts, sort_peft_keys(file.places, str(path)))
    elif manifest.layout == "lorry":
        surplus = _assign_own(parts, [k for k in file.places if k not in set(shared.values())])
    else:
        raise CheckpointError(
            f"'{path / MANIFEST}' names the unknown layout '{manifest.layout}'; known are peft and lorry."
        )
    if surplus:
        raise CheckpointError(
            f"'{file.path}' holds {len(surplus)} tensors that belong to none of its sites: {some(surplus)}."
        )
    return AdapterFile(
        path=path,
        format="lorry",
        name=manifest.name,
        method=manifest.method,
        sites=parts,
        file=file,
        fingerprint=manifest.fingerprint,
        base=manifest.fingerprint.base,
        metadata=manifest.metadata,
        notes=manifest.notes,
        shared=shared,
        manifest=manifest,
        loaded=loaded,
    )


def _assign_own(parts: Mapping[str, Part], keys: list[str]) -> list[str]:
    surplus = []
    for key in keys:
        path = key.rpartition(".")[0]
        while path and path not in parts:
            path = path.rpartition(".")[0]
        part = parts.get(path)
        if part is None:
            surplus.append(key)
        else:
            part.keys[key[len(path) + 1 if path else 0 :]] = key
    return surplus


def _assign_peft(parts: Mapping[str, Part], keys: PeftKeys) -> list[str]:
    modules = peft_modules([(p, part.kind or "") for p, part in parts.items() if part.kind != "block"])
    surplus: list[str] = []
    places: dict[tuple[str, int], str] = {}
    for path, module in modules.items():
        depth = 0
        if ".base_layer" in module:
            while module.endswith(".base_layer"):
                module, depth = module[:-11], depth + 1
            module = module.replace(".base_layer.", ".")
        places[module, depth] = path
    for place, found in keys.sites.items():
        at = places.get(place)
        if at is None:
            surplus += found.values()
        else:
            parts[at].keys = found
    blocks = {p: part for p, part in parts.items() if part.kind == "block"}
    named = {f"{path}": key for path, key in keys.whole.items()}
    left = set(_assign_own(blocks, list(named))) if named else set()
    for part in blocks.values():
        part.keys = {name: named[full] for name, full in part.keys.items()}
    return surplus + [named[p] for p in named if p in left]


def _peft(path: Path, config: PeftConfig, file: TensorFile, loaded: Loaded | None) -> AdapterFile:
    where = str(path)
    keys = sort_peft_keys(file.places, where)
    if not keys.sites and not keys.whole:
        raise CheckpointError(f"'{file.path}' holds no tensors.")
    parts: dict[str, Part] = {}
    wanted = ("A", "B", "magnitude") if config.values.get("use_dora") else ("A", "B")
    parameters = bool(config.values.get("target_parameters"))
    for (module, depth), names in keys.sites.items():
        if len(names) != len(wanted):
            check_complete(names, module, wanted, where)
        label = module if not depth else module + ".base_layer" * depth
        method = config.method(module, parameter=parameters and (depth > 0 or not config.targeted(module)))
        kind = "conv" if len(file.places[names["A"]].shape) > 2 else None
        if names["A"].find(".base_layer.") > 0 and module.endswith(".out_proj"):
            kind = "qkv"
        parts[label] = Part(module, method, names, depth, kind)
    copies = _whole_parts(config, keys.whole, parts)
    values = config.values
    facts = {"source": "peft", **{k: values[k] for k in ("task_type", "peft_version") if values.get(k)}}
    method = config.method("")
    return AdapterFile(
        path=path,
        format="peft",
        name=path.name,
        method=method,
        sites=parts,
        file=file,
        base=str(values.get("base_model_name_or_path") or ""),
        metadata=facts,
        notes=config.notes,
        config=config,
        base_copies=copies,
        loaded=loaded,
    )


def _whole_parts(config: PeftConfig, whole: Mapping[str, str], parts: dict[str, Part]) -> dict[str, str]:
    """Add the modules that were trained whole to `parts`; return the parameters that are none of theirs."""
    saved = tuple(config.values.get("modules_to_save") or ())
    full = method_from("full")
    copies = {}
    for path, key in whole.items():
        words = path.replace(".base_layer.", ".").split(".")
        for size in range(1, len(words)):
            module = ".".join(words[:size])
            if any(module == s or module.endswith(f".{s}") for s in saved):
                part = parts.setdefault(module, Part(module, full, kind="block"))
                part.keys[".".join(words[size:])] = key
                break
        else:
            copies[".".join(words)] = key
    return copies


def _single(path: Path, eager: bool) -> AdapterFile:
    file = TensorFile(path)
    loaded = file.load() if eager else None
    read = loaded.tensors.__getitem__ if loaded is not None else file.read
    single = read_single(file.places, file.metadata, read, str(path))
    doubled = len({p.component for p in single.parts}) > 1
    parts = {f"{p.component}.{p.path}" if doubled else p.path: p for p in single.parts}
    first = max(single.parts, key=lambda p: p.method.rank if hasattr(p.method, "rank") else 0).method
    facts = {k: v for k, v in file.metadata.items() if k.startswith(("ss_", "modelspec")) and len(v) < 200}
    return AdapterFile(
        path=path,
        format="kohya" if single.format == "kohya" else "diffusers",
        name=path.stem,
        method=first,
        sites=parts,
        file=file,
        base=facts.get("ss_sd_model_name", ""),
        metadata={"source": single.format, **facts},
        notes=tuple(single.notes),
        loaded=loaded,
    )
