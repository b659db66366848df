"""Mixtures made from adapters that exist: on the same model, or in files, which stay as they are."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lorry.core.errors import AdapterError, some
from lorry.core.forward.entry import Entry
from lorry.core.life.adapter import Adapter
from lorry.core.life.api import adapters, check_name, install
from lorry.core.life.build import build
from lorry.core.life.state import open_state
from lorry.core.method.base import Method
from lorry.core.method.families import Bottleneck
from lorry.core.method.registry import method_from
from lorry.core.receipt import Receipt
from lorry.core.sites.site import Site
from lorry.formats.load import load


def from_adapters(
    model: nn.Module,
    method: Method | Mapping[str, Any] | str,
    experts: Sequence[str | os.PathLike[str]],
    *,
    name: str = "mixture",
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    activate: bool = True,
) -> Adapter:
    """Attach a mixture whose experts are adapters that exist.

    Parameters
    ----------
    model
        The base; files are checked against it as in `lorry.load`.
    method
        One that adopts other adapters (``lora-mixer``, ``comol``), with its options; number and ranks of
        experts are filled in.
    experts
        Names of adapters on the model, or paths of adapter files. They must be plain low-rank adapters on the
        same sites; ranks may differ where the method allows it. Nothing of them is changed; the mixture holds
        copies.
    name, seed, dtype, activate
        As in `lorry.attach`.

    Raises
    ------
    AdapterError
        Experts on different sites, or one whose update is not a product of two factors. The model is as it
        was.
    """
    method = method if isinstance(method, Method) else method_from(method)
    if not experts:
        raise AdapterError("A mixture needs at least one adapter as its expert.")
    before = open_state(model).active
    loaded: list[Adapter] = []
    try:
        members = [_member(model, expert, number, loaded) for number, expert in enumerate(experts)]
        state = members[0].state
        check_name(name, state)
        _check_sites(members, experts)
        adapter = _mixture(members, experts, method, name, seed, dtype)
        install(adapter, trainable=True, activate=activate)
    finally:
        for temporary in loaded:
            temporary.detach()
    if not activate and before is not None:
        adapter.state.active = before
    return adapter


def _mixture(
    members: Sequence[Adapter],
    experts: Sequence[str | os.PathLike[str]],
    method: Method,
    name: str,
    seed: int,
    dtype: torch.dtype,
) -> Adapter:
    """Return an adapter that the model does not know of yet, filled from its experts."""
    sites: list[tuple[Site, Method]] = []
    for path, first in members[0].entries.items():
        fitted = method.with_experts([_factors(member.entries[path])[0].shape[0] for member in members])
        fitted.check_site(first.site)
        sites.append((first.site, fitted))
    facts = {"seed": seed, "experts": [str(expert) for expert in experts]}
    state, whole = members[0].state, sites[0][1]
    adapter = build(state, name, whole, sites, dtype=dtype, values=None, seed=seed, metadata=facts)
    error = 0.0
    with torch.no_grad():
        for path, entry in adapter.entries.items():
            given = [_factors(member.entries[path]) for member in members]
            error = max(error, entry.method.adopt(entry.tensors(), entry.site, given))
    count = sum(len(home.specs) for _, home in adapter.homes())
    notes = tuple(map(str, experts))
    adapter.receipt = Receipt("import", name, count, count, len(sites), "match", 0.0, error, notes)
    return adapter


def _member(model: nn.Module, expert: str | os.PathLike[str], number: int, loaded: list[Adapter]) -> Adapter:
    """Return an adapter of the model, or one read from a file and noted in `loaded`."""
    state = open_state(model)
    if isinstance(expert, str) and expert in state.adapters:
        return adapters(model)[expert]
    if not Path(expert).exists():
        raise AdapterError(
            f"Expert '{expert}' is neither an adapter on this model ({some(state.adapters)}) nor a file."
        )
    loaded.append(load(model, expert, name=f"expert-{number}-of-mixture", activate=False))
    return loaded[-1]


def _check_sites(members: Sequence[Adapter], experts: Sequence[str | os.PathLike[str]]) -> None:
    first = set(members[0].entries)
    for member, expert in zip(members, experts, strict=True):
        other = first ^ set(member.entries)
        if other:
            raise AdapterError(
                f"Experts must sit on the same sites, but '{experts[0]}' and '{expert}' differ at "
                f"{some(sorted(other))}."
            )


def _factors(entry: Entry) -> tuple[Tensor, Tensor, float]:
    """Return A ``(rank, in)``, B ``(out, rank)`` and the scale of a plain low-rank adapter."""
    method = entry.method
    if not isinstance(method, Bottleneck) or not method.plain or entry.site.lead:
        raise AdapterError(
            f"Adapter '{entry.name}' ({type(method).__name__}) cannot be an expert: its update at '{entry.site.path}' "
            "is not a product of two factors."
        )
    a, b = method.factors(entry.tensors(), entry.site)
    return a.detach(), b.detach(), method.scale(entry.site)
