"""Adapters as data, cut by the places that they sit at and put together again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from lorry.core.errors import AdapterError, near_misses, some
from lorry.core.sites.fingerprint import Fingerprint
from lorry.formats.bundle import bundled
from lorry.formats.file import AdapterFile


def within(path: str, blocks: Sequence[str]) -> bool:
    """Return whether a path is one of these modules, or lies in one; ``a.1`` does not hold ``a.10``."""
    return any(path == block or path.startswith(f"{block}.") for block in blocks)


def part_of(file: AdapterFile, blocks: Sequence[str], name: str | None = None) -> AdapterFile:
    """Return what of an adapter sits in some modules, as an adapter of its own.

    Parameters
    ----------
    file
        Not changed; of a bundle, every root is searched.
    blocks
        Paths of modules; for a bundle with or without the root in front.
    name
        Of the part; that of the whole if not given.

    Raises
    ------
    AdapterError
        Nothing sits there, the sites share tensors, or only a model tells which sites there are.
    """
    if file.needs_model or file.flat:
        raise AdapterError(
            f"'{file.where}' does not tell its sites without a model: load it, and save it in Lorry's form first."
        )
    if file.components:
        parts = {}
        for root, component in file.components.items():
            inside = [block.removeprefix(f"{root}.") for block in blocks]
            if any(within(path, inside) for path in component.sites):
                parts[root] = part_of(component, inside, name)
        _found(parts, file, blocks)
        return bundled(parts, name or file.name, file.metadata)
    if file.shared or file.shared_values:
        raise AdapterError(f"The sites of '{file.where}' share tensors, so no part of them can stand alone.")
    chosen = [path for path in file.sites if within(path, blocks)]
    _found(chosen, file, blocks)
    sites = {}
    for path in chosen:
        stored, facts = file.sites[path], file.facts(path)
        sites[path] = replace(
            stored, keys={}, kind=facts.kind, shape=facts.shape, component="", values=file.tensors(path)
        )
    print_of = file.fingerprint
    if print_of is not None:
        print_of = Fingerprint({path: print_of.sites[path] for path in chosen if path in print_of.sites}, print_of.base)
    return AdapterFile(
        name=name or file.name,
        method=next(iter(sites.values())).method,
        sites=sites,
        fingerprint=print_of,
        base=file.base,
        metadata=dict(file.metadata),
        root=file.root,
    )


def union(parts: Mapping[str, AdapterFile], name: str = "default") -> AdapterFile:
    """Return one adapter of several that sit at different places of one base.

    Parameters
    ----------
    parts
        What each is called -> the adapter; bundles with bundles only.

    Raises
    ------
    AdapterError
        There are none, or two of them sit at one place.
    FingerprintError
        They were made for different bases.
    """
    if not parts:
        raise AdapterError("A union needs at least one adapter.")
    bundles = [bool(part.components) for part in parts.values()]
    if any(bundles) and not all(bundles):
        raise AdapterError("Adapters over several roots and adapters over one cannot be put together; bundle them all.")
    if all(bundles):
        roots = list(dict.fromkeys(root for part in parts.values() for root in part.components))
        return bundled(
            {
                root: union({n: p.components[root] for n, p in parts.items() if root in p.components}, name)
                for root in roots
            },
            name,
        )
    owner: dict[str, str] = {}
    for label, part in parts.items():
        both = [path for path in part.sites if path in owner]
        if both:
            raise AdapterError(
                f"'{owner[both[0]]}' and '{label}' both sit at '{both[0]}'; a union takes adapters of different places "
                "(merge them instead)."
            )
        owner |= dict.fromkeys(part.sites, label)
    prints = [part.fingerprint for part in parts.values() if part.fingerprint is not None]
    for later in prints[1:]:
        prints[0].require(later, "the adapters of a union")
    first = next(iter(parts.values()))
    return AdapterFile(
        name=name,
        method=first.method,
        sites={path: site for part in parts.values() for path, site in part_of(part, list(part.sites)).sites.items()},
        fingerprint=Fingerprint({k: v for p in prints for k, v in p.sites.items()}, prints[0].base) if prints else None,
        base=first.base,
        metadata={"union": {label: dict(part.metadata) for label, part in parts.items()}},
    )


def _above(path: str) -> list[str]:
    """The modules around a site."""
    names = path.split(".")
    return [".".join(names[:count]) for count in range(1, len(names))]


def _found(found: object, file: AdapterFile, blocks: Sequence[str]) -> None:
    if not found:
        near = near_misses(blocks[0], {p for path in file.sites for p in _above(path)}) if blocks else ""
        raise AdapterError(f"'{file.where}' has nothing in {some(blocks)}.{near}")
