"""Reading Lorry's own folder: an adapter of one root, or a bundle over several."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from lorry.core.errors import CheckpointError, some
from lorry.formats.file import AdapterFile
from lorry.formats.folders import MANIFEST, PEFT_CONFIG, TENSORS
from lorry.formats.manifest import Manifest, Section, read_manifest
from lorry.formats.reader import READERS, Location, Reader
from lorry.formats.stored import PeftKeys, StoredSite, peft_modules, sort_peft_keys
from lorry.formats.tensors import TensorFile

#: Between the root and the tensor's own name in the file of a bundle; a parameter's name has no slash.
ROOT_MARK = "/"


class LorryFolder(Reader):
    """A folder with ``lorry.json``."""

    def recognises(self, location: Location) -> bool:
        """Whether there are a manifest and tensors."""
        return location.has(MANIFEST) and location.has(TENSORS)

    def read(self, location: Location) -> AdapterFile:
        """Open it; the manifest and the tensors must have been written together."""
        where = str(location.path / MANIFEST)
        manifest = read_manifest(location.json(MANIFEST), where)
        file = location.tensors()
        _check_together(manifest, file, where)
        if not manifest.bundle:
            return _adapter(location, manifest, manifest.sections[""], file, "")
        parts = {r: _adapter(location, manifest, s, file, r) for r, s in manifest.sections.items()}
        strange = [k for k in file.places if k.partition(ROOT_MARK)[0] not in parts or ROOT_MARK not in k]
        if strange:
            raise CheckpointError(
                f"'{file.path}' holds {len(strange)} tensors that belong to none of its roots: {some(strange)}."
            )
        return AdapterFile(
            name=manifest.name,
            method=next(iter(parts.values())).method,
            sites={f"{root}.{path}": s for root, part in parts.items() for path, s in part.sites.items()},
            format="lorry",
            path=location.path,
            file=file,
            metadata=manifest.metadata,
            notes=manifest.notes,
            loader="bundle",
            components=parts,
        )


READERS.add("lorry", LorryFolder())


def _check_together(manifest: Manifest, file: TensorFile, where: str) -> None:
    if manifest.digest != file.metadata.get("lorry_digest", ""):
        raise CheckpointError(
            f"'{where}' was not written with the tensors beside it: a save was interrupted, or another tool replaced "
            f"the tensors. Save the adapter again, or remove {MANIFEST} to read the folder as PEFT's."
        )
    if manifest.tensors != len(file.places):
        raise CheckpointError(f"'{file.path}' holds {len(file.places)} tensors, its manifest names {manifest.tensors}.")
    file.expect(manifest.digest, manifest.checksums)


def _adapter(location: Location, manifest: Manifest, section: Section, file: TensorFile, root: str) -> AdapterFile:
    """Return the adapter of one root; the empty root is the only one."""
    prefix = f"{root}{ROOT_MARK}" if root else ""
    sites = {
        p: StoredSite(
            p, m, kind=section.kinds[p], shape=section.shapes[p], kernel=section.kernels.get(p, ()), component=root
        )
        for p, m in section.methods.items()
    }
    shared = {name: f"{prefix}shared.{name}" for name in section.shared}
    if section.layout == "peft" and not root:
        surplus = _assign_peft(sites, sort_peft_keys(file.places, str(location.path)))
    elif section.layout == "lorry":
        own = [k for k in file.places if k.startswith(prefix) and k not in set(shared.values())]
        surplus = _assign_own(sites, own, prefix)
    else:
        raise CheckpointError(
            f"'{location.path / MANIFEST}' names the unknown layout '{section.layout}'; known are peft and lorry."
        )
    if surplus:
        raise CheckpointError(
            f"'{file.path}' holds {len(surplus)} tensors that belong to none of its sites: {some(surplus)}."
        )
    return AdapterFile(
        name=manifest.name,
        method=section.method,
        sites=sites,
        format="lorry",
        path=location.path,
        layout=section.layout,
        file=file,
        fingerprint=section.fingerprint,
        base=section.fingerprint.base,
        metadata=section.metadata,
        notes=() if root else manifest.notes,
        shared=shared,
        targets=(lambda: location.json(PEFT_CONFIG)) if location.has(PEFT_CONFIG) and not root else None,
        partial=bool(root),
    )


def _assign_own(sites: Mapping[str, StoredSite], keys: Iterable[str], prefix: str = "") -> list[str]:
    """Give each key to the site with the longest path that it begins with; return those of none."""
    surplus = []
    for key in keys:
        full = key[len(prefix) :]
        path = full.rpartition(".")[0]
        while path and path not in sites:
            path = path.rpartition(".")[0]
        stored = sites.get(path)
        if stored is None:
            surplus.append(key)
        else:
            stored.keys[full[len(path) + 1 if path else 0 :]] = key
    return surplus


def _assign_peft(sites: Mapping[str, StoredSite], keys: PeftKeys) -> list[str]:
    modules = peft_modules([(p, stored.kind or "") for p, stored in sites.items() if stored.kind != "block"])
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
            sites[at].keys = found
    blocks = {p: stored for p, stored in sites.items() if stored.kind == "block"}
    named = dict(keys.whole)
    left = set(_assign_own(blocks, list(named))) if named else set()
    for stored in blocks.values():
        stored.keys = {name: named[full] for name, full in stored.keys.items()}
    return surplus + [named[p] for p in named if p in left]
