"""Kinds of sites: how `down`, `up` and a dense update are applied in each sort of layer, each written once.

Each file registers one kind; `lorry.core.sites.site.Kind` says what a kind can do. This package asks them in the order
of their priority.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import nn

from lorry.core.sites.site import KINDS, Kind, Site, register_kind, registered_kind
from lorry.core.sites.stacks import find_stacks

__all__ = ["KINDS", "Kind", "catalogue", "current_name", "kind_named", "kinds_in_order", "register_kind"]
KINDS.source(__name__, __path__)


def kinds_in_order() -> list[Kind]:
    """Return all kinds in the order in which they are asked, the most special first; equal ones by name."""
    return sorted(KINDS.values(), key=lambda kind: (-kind.priority, kind.name))


def current_name(name: str) -> str:
    """Return what the kind that was once called `name` is called now; other names are returned as they are."""
    if name in KINDS:
        return name
    return next((kind.name for kind in KINDS.values() if name in kind.aliases), name)


def kind_named(name: str) -> Kind:
    """Return the kind of this name, or of this former name.

    Raises
    ------
    SiteError
        There is none, with near misses.
    """
    return registered_kind(current_name(name))


def sites_in(path: str, module: nn.Module, kinds: Sequence[Kind] | None = None) -> list[Site]:
    """Return the sites that a module owns, of the first of `kinds` (all in their order if not given) that finds any in
    it; whole modules are not meant.
    """
    for kind in kinds_in_order() if kinds is None else kinds:
        if not kind.whole and (sites := list(kind.sites(path, module))):
            return sites
    return []


def catalogue(model: nn.Module) -> dict[str, Site]:
    """Return every site of `model` by path, in module order; parts of a site that has several are not listed twice."""
    found: dict[str, Site] = {}
    taken: set[int] = set()
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    kinds = kinds_in_order()
    for path, module in model.named_modules():
        if id(module) in taken:
            continue
        for site in sites_in(path, module, kinds):
            taken.add(id(site.holder))
            found[site.path] = replace(site, tied=_ties(site, names, path))
    stacks = find_stacks(found, model)
    return {path: replace(site, layer=stacks.layer(path)) for path, site in found.items()}


def _ties(site: Site, names: dict[int, list[str]], path: str) -> tuple[str, ...]:
    """Return the names of other parameters that share the site's tensor."""
    weight = getattr(site.holder, site.parameter)
    if site.holder is not site.owner or not torch.is_tensor(weight):
        return ()
    own = f"{path}.{site.parameter}" if path else site.parameter
    return tuple(n for n in names.get(id(weight), ()) if n != own)
