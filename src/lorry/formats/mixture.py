"""Adapters made from other adapters, which stay as they are: mixtures of experts, averages of gated methods.

A method says by `Method.with_experts` and `Method.adopt` that it can be made so (a router over LoRAs, say), and
everything else is here: without a model (`mixture`), or on one (`from_adapters`).
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lorry.core.errors import AdapterError, FingerprintError, OptionError, some
from lorry.core.life.adapter import Adapter
from lorry.core.life.api import adapters, check_name
from lorry.core.life.state import open_state
from lorry.core.method.base import Expert, Method
from lorry.core.method.registry import method_from, methods
from lorry.core.method.spec import TensorSpec
from lorry.core.method.start import fresh, joint_layout, mix_seed
from lorry.core.receipt import Receipt
from lorry.core.sites.fingerprint import Fingerprint
from lorry.core.sites.site import Site
from lorry.formats.file import AdapterFile
from lorry.formats.load import load
from lorry.formats.snapshot import as_file
from lorry.formats.stored import StoredSite

PathLike = str | os.PathLike[str]


def adopting() -> list[str]:
    """Return the slugs of the methods that can be made from other adapters."""
    return sorted(slug for slug, info in methods().items() if info.cls.adopts())


def mixture(
    experts: Mapping[str, AdapterFile],
    method: Method | Mapping[str, Any] | str,
    *,
    weights: Mapping[str, float] | None = None,
    name: str = "mixture",
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    check_base: bool = True,
) -> tuple[AdapterFile, float]:
    """Make an adapter from others, without a model.

    Parameters
    ----------
    experts
        The adapters by name, in the order of the experts. They must sit on the same sites.
    method
        One of `adopting`, with its options; number, ranks and the like are filled in.
    weights
        Name -> weight; 1/n for each if not given, which leaves every expert as it is.
    name, seed, dtype
        Of the result; the seed draws what the experts do not tell (a router).
    check_base
        Refuse experts that were made for different bases.

    Returns
    -------
    AdapterFile
        The adapter.
    float
        Error of what the method makes of the experts, relative to them; the largest over the sites.

    Raises
    ------
    AdapterError
        Experts on different sites, or that the method cannot be made from; the method is made from none.
    FingerprintError
        Experts of different bases.
    """
    method = method if isinstance(method, Method) else method_from(method)
    if not experts:
        raise AdapterError("A mixture needs at least one adapter as its expert.")
    _check_sites(experts)
    mark = _common_base(experts, check_base)
    sites, shared, error = _filled(experts, method, _factors(experts, weights), seed, dtype)
    made = AdapterFile(
        name=name,
        method=next(iter(sites.values())).method,
        sites=sites,
        fingerprint=mark,
        base=next((f.base for f in experts.values() if f.base), ""),
        metadata={"seed": seed, "experts": {n: f.where for n, f in experts.items()}},
        shared_values=shared,
    )
    return made, error


def _filled(
    experts: Mapping[str, AdapterFile], method: Method, weights: Mapping[str, float], seed: int, dtype: torch.dtype
) -> tuple[dict[str, StoredSite], dict[str, Tensor], float]:
    """Return the sites with their tensors, the tensors that they share, and the largest error of adopting."""
    first = next(iter(experts.values()))
    given: dict[str, list[Expert]] = {}
    chosen: list[tuple[Site, Method]] = []
    for path in first.sites:
        given[path] = [
            Expert(n, f.stored(path)[1].method, f.all_tensors(path), f.site(path), weights[n])
            for n, f in experts.items()
        ]
        site, fitted = first.site(path), method.with_experts(given[path])
        fitted.check_site(site)
        chosen.append((site, fitted))
    layout = joint_layout(chosen)

    def fill(prefix: str, specs: Mapping[str, TensorSpec]) -> dict[str, Tensor]:
        return {key: fresh(spec, mix_seed(seed, f"{prefix}.{key}"), dtype) for key, spec in specs.items()}

    shared = fill("shared", layout.shared)
    sites, error = {}, 0.0
    for site, fitted in chosen:
        path = site.path
        own, facts = fill(path, layout.sites[path]), first.facts(path)
        with torch.no_grad():
            error = max(error, fitted.adopt({**shared, **own}, site, given[path]))
        sites[path] = StoredSite(
            path,
            fitted,
            kind=facts.kind,
            shape=facts.shape,
            kernel=facts.kernel,
            values=own,
            site=first.stored(path)[1].site,
        )
    return sites, shared, error


def from_adapters(
    model: nn.Module,
    method: Method | Mapping[str, Any] | str,
    experts: Sequence[PathLike] | Mapping[str, PathLike],
    *,
    weights: Mapping[str, float] | Sequence[float] | None = None,
    name: str = "mixture",
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    activate: bool = True,
    check_base: bool = True,
) -> Adapter:
    """Attach an adapter that is made from adapters that exist, ready to be trained further (its router).

    Parameters
    ----------
    model
        The base; files are checked against it as in `lorry.load`.
    method, seed, dtype
        As in `mixture`.
    experts
        Names of adapters on the model, or paths of adapter files, in order or by name. Nothing of them is changed; the
        result holds copies.
    weights
        By name, or in their order.
    name, activate, check_base
        As in `lorry.load`.

    Raises
    ------
    AdapterError, FingerprintError
        As for `mixture`. The model is as it was.
    """
    state = open_state(model)
    before = state.active
    named = dict(experts) if isinstance(experts, Mapping) else _named(experts)
    if weights is not None and not isinstance(weights, Mapping):
        weights = _in_order(weights, named)
    loaded: list[Adapter] = []
    try:
        members = {n: _member(model, expert, loaded, check_base) for n, expert in named.items()}
        check_name(name, state)
        made, error = mixture(
            members, method, weights=weights, name=name, seed=seed, dtype=dtype, check_base=check_base
        )
    finally:
        for temporary in loaded:
            temporary.detach()
    made.metadata["experts"] = [str(expert) for expert in named.values()]
    adapter = made.load(model, name=name, trainable=True, activate=activate, check_base=check_base)
    if not activate:
        state.active = before
    count = sum(len(home.specs) for _, home in adapter.homes())
    notes = tuple(map(str, named.values()))
    adapter.receipt = Receipt("import", name, count, count, len(adapter.entries), "match", 0.0, error, notes)
    return adapter


def _named(experts: Sequence[PathLike]) -> dict[str, PathLike]:
    """Return experts under names of their own: the last part of a path, numbered where that is taken."""
    found: dict[str, PathLike] = {}
    for expert in experts:
        own, number = Path(expert).name or "expert", 2
        unique = own
        while unique in found:
            unique, number = f"{own}-{number}", number + 1
        found[unique] = expert
    return found


def _in_order(weights: Sequence[float], named: Mapping[str, Any]) -> dict[str, float]:
    if len(weights) != len(named):
        raise OptionError(f"A mixture of {len(named)} adapters needs as many weights, found {len(weights)}.")
    return dict(zip(named, weights, strict=True))


def _factors(experts: Mapping[str, Any], weights: Mapping[str, float] | None) -> dict[str, float]:
    """Return each expert's weight times their number, exactly 1 where no weights are given."""
    if weights is None:
        return dict.fromkeys(experts, 1.0)
    if set(weights) != set(experts):
        raise OptionError(f"Weights must be given for {sorted(experts)}, found {sorted(weights)}.")
    for name, weight in weights.items():
        if isinstance(weight, bool) or not isinstance(weight, int | float):
            raise OptionError(f"The weight of '{name}' must be a number, the same at all sites, found {weight!r}.")
    return {n: float(weights[n]) * len(experts) for n in experts}


def _member(model: nn.Module, expert: PathLike, loaded: list[Adapter], check_base: bool) -> AdapterFile:
    """Return an adapter of the model, or one read from a file and noted in `loaded`, as data."""
    state = open_state(model)
    if isinstance(expert, str) and expert in state.adapters:
        return as_file(adapters(model)[expert], copy=False)
    if not Path(expert).exists():
        raise AdapterError(
            f"Expert '{expert}' is neither an adapter on this model ({some(state.adapters)}) nor a file."
        )
    own = f"expert-{len(loaded)}-of-mixture"
    loaded.append(load(model, expert, name=own, activate=False, check_base=check_base))
    return as_file(loaded[-1], copy=False)


def _check_sites(experts: Mapping[str, AdapterFile]) -> None:
    (name, first), *rest = experts.items()
    for other_name, other in rest:
        apart = sorted(set(first.sites) ^ set(other.sites))
        if apart:
            raise AdapterError(
                f"Experts must sit on the same sites, but '{name}' and '{other_name}' differ at {some(apart)}."
            )
        for path in first.sites:
            if first.facts(path).shape != other.facts(path).shape:
                raise AdapterError(
                    f"Experts must be made for one base, but '{path}' is {first.facts(path).shape} for '{name}' and "
                    f"{other.facts(path).shape} for '{other_name}'."
                )


def _common_base(experts: Mapping[str, AdapterFile], check: bool) -> Fingerprint | None:
    """Return the fingerprint that the experts were made for; those that say nothing are taken on trust."""
    known = [(n, f.fingerprint) for n, f in experts.items() if f.fingerprint is not None and f.fingerprint.sites]
    for number, (name, mark) in enumerate(known):
        for other_name, other in known[number + 1 :]:
            if check and mark.compare(other) == "differs":
                raise FingerprintError(
                    f"Experts of a mixture must be made for one base: '{name}' was made for '{mark.base or 'unnamed'}' "
                    f"({mark.digest}), '{other_name}' for '{other.base or 'unnamed'}' ({other.digest}). Pass "
                    "check_base=False if you know better."
                )
    return known[0][1] if known else None
