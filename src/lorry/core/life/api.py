"""The public verbs: attach, activate, rows, adapters, plan."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lorry.core.errors import AdapterError, SiteError
from lorry.core.forward.active import Composition
from lorry.core.life.adapter import Adapter, build
from lorry.core.life.state import ModelState, keep_state, open_state, state_of
from lorry.core.method.base import Method, MethodInfo
from lorry.core.method.call import Context
from lorry.core.method.registry import method_from
from lorry.core.method.registry import methods as registered
from lorry.core.receipt import Receipt
from lorry.core.sites.site import Site
from lorry.core.sites.targets import Targets, matches, select

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.\-]{0,127}")
SiteOptions = Mapping[str, Mapping[str, Any]]


def attach(
    model: nn.Module,
    method: Method | Mapping[str, Any] | str = "lora",
    *,
    targets: Targets = "all-linear",
    name: str = "default",
    seed: int = 0,
    exclude: Targets = (),
    layers: Sequence[int] | None = None,
    site_options: SiteOptions | None = None,
    train_also: Sequence[str] = (),
    dtype: torch.dtype = torch.float32,
    activate: bool = True,
) -> Adapter:
    """Attach a fresh adapter to a model in place and freeze the base.

    Parameters
    ----------
    model
        Any ``nn.Module``; it keeps its type, its paths and its state-dict keys.
    method
        A method, or its slug, or ``{"method": slug, **options}``.
    targets, exclude, layers
        Which sites; see `lorry.core.sites.targets.select`.
    name
        Letters, digits, ``_``, ``-`` and ``.``; unique on the model.
    seed
        Start of every tensor; it depends on seed, site path and tensor name alone.
    site_options
        Pattern -> options that replace the method's at matching sites, e.g. ``{"mlp.*": {"rank": 16}}``.
    train_also
        Modules (by target syntax) whose whole weights are trained beside the adapter, e.g. ``["score"]``; they are
        copies, the base keeps its own.
    dtype
        Of the adapter's floating tensors.
    activate
        Let it apply from now on.

    Raises
    ------
    SiteError, AdapterError, OptionError
        Nothing is changed then.
    """
    method = method if isinstance(method, Method) else method_from(method)
    state = open_state(model)
    check_name(name, state)
    chosen = choose(state, method, targets, exclude=exclude, layers=layers, site_options=site_options)
    chosen += whole_modules(state, train_also)
    state.check_owners(site for site, _ in chosen)
    adapter = build(state, name, method, chosen, dtype=dtype, values=None, seed=seed, metadata={"seed": seed})
    count = sum(len(home.specs) for _, home in adapter.homes())
    notes = tuple(
        f"'{site.path}' shares its weight with {', '.join(site.tied)}; the adapter acts at '{site.path}' only"
        for site, _ in chosen
        if site.tied
    )
    adapter.receipt = Receipt("attach", name, count, count, len(chosen), "match", notes=notes)
    return install(adapter, trainable=True, activate=activate)


def install(adapter: Adapter, *, trainable: bool, activate: bool) -> Adapter:
    """Let the model know an adapter that was built for it."""
    state = adapter.state
    keep_state(state)
    state.add(adapter)
    if trainable:
        adapter.train()
    if activate:
        state.activate(adapter.name)
    return adapter


def check_name(name: str, state: ModelState) -> None:
    """Raise `AdapterError` unless `name` is well formed and free."""
    if not isinstance(name, str) or not _NAME.fullmatch(name) or name == "shared":
        raise AdapterError(
            "An adapter's name consists of letters, digits, '_', '-' and '.', begins with a letter or digit, and is "
            "not "
            f"'shared'; found {name!r}."
        )
    if name in state.adapters:
        raise AdapterError(f"An adapter '{name}' is attached already. Detach it first, or choose another name.")


def choose(
    state: ModelState,
    method: Method,
    targets: Targets,
    *,
    exclude: Targets = (),
    layers: Sequence[int] | None = None,
    site_options: SiteOptions | None = None,
) -> list[tuple[Site, Method]]:
    """Return the sites that targets mean, each with the method to use there, checked against each other."""
    selection = select(
        state.root, state.sites, targets, kinds=(*method.info.kinds, *method.gathers), exclude=exclude, layers=layers
    )
    chosen: list[tuple[Site, Method]] = []
    unused = set(site_options or ())
    for site, placed in method.place(selection.sites, state.root):
        here: Method | None = placed
        for pattern, options in (site_options or {}).items():
            if matches(site.path, pattern):
                here = here.with_options(**options) if here is not None else None
                unused.discard(pattern)
        here = here.for_site(site) if here is not None else None
        if here is None:
            continue
        here.check_site(site)
        chosen.append((site, here))
    if unused:
        raise SiteError(f"site_options {sorted(unused)} match none of the {len(chosen)} chosen sites.")
    if not chosen:
        raise SiteError(f"{type(method).__name__} leaves out every site that {targets!r} selects.")
    return chosen


def whole_modules(state: ModelState, patterns: Sequence[str]) -> list[tuple[Site, Method]]:
    """Return modules that are trained whole beside an adapter, as block sites with the method ``full``."""
    chosen: list[tuple[Site, Method]] = []
    if isinstance(patterns, str):
        patterns = [patterns]
    for pattern in patterns:
        full = method_from("full")
        modules = {p: m for p, m in state.root.named_modules() if p and matches(p, pattern)}
        if not modules:
            raise SiteError(f"train_also: '{pattern}' matches no module of {type(state.root).__name__}.")
        from lorry.core.sites.kinds.block import BLOCK

        chosen += [(BLOCK.site(path, module), full) for path, module in modules.items()]
    return chosen


def activate(model: nn.Module, composition: str | Composition | None) -> None:
    """Let adapters apply to every row from now on.

    Parameters
    ----------
    model
        A model with adapters.
    composition
        A name, ``{name: weight, ...}`` (the weighted sum of the updates), or None for the bare base.
    """
    if composition is None:
        from lorry.core.life.state import unwrapped

        state = unwrapped(model).__dict__.get("_lorry_state")
        if state is not None:
            state.activate(None)
        return
    state_of(model).activate(composition)


@contextmanager
def rows(
    model: nn.Module,
    compositions: Sequence[str | Composition | None],
    *,
    seeds: Mapping[str, int] | None = None,
) -> Iterator[None]:
    """Give each row of a batch its own composition of adapters while the context lasts, in training as in inference.

    Parameters
    ----------
    model
        A model with adapters.
    compositions
        For each row a name, ``{name: weight}``, or None for the bare base. A generation that expands each row (beams,
        several samples) keeps the row's composition.
    seeds
        Adapter -> seed of its dropout in this pass; torch's global generator decides otherwise.
    """
    state = state_of(model)
    before = state.active
    state.active = state.rows(compositions, seeds)
    try:
        yield
    finally:
        state.active = before


@contextmanager
def context(model: nn.Module, **facts: Any) -> Iterator[Context]:
    """Tell methods what they may need of a forward pass, and collect what layers leave behind.

    Parameters
    ----------
    model
        A model with adapters.
    facts
        Fields of `lorry.core.method.call.Context` (``padding_mask``, ``token_kinds``, ``task_ids``, ``timestep``,
        ``recording``); any other name goes into ``values``.
    """
    state = state_of(model)
    known = {k: v for k, v in facts.items() if k in Context.__dataclass_fields__}
    fresh = replace(Context(), **known)
    fresh.values.update({k: v for k, v in facts.items() if k not in known})
    before, state.context = state.context, fresh
    try:
        yield fresh
    finally:
        state.context = before


def auxiliary_loss(model: nn.Module, adapter: str | None = None) -> Tensor | None:
    """Return the sum of the auxiliary losses that layers left in the last pass, or None if there are none.

    The penalties that methods put on the tensors of adapters in training are part of it.
    """
    state = state_of(model)
    losses = state.context.losses
    chosen = [value for (owner, _, _), value in losses.items() if adapter is None or owner == adapter]
    for name in state.adapters if adapter is None else [adapter]:
        if name in state.adapters and any(key[0] == name for key in state.context.left):
            chosen += state.adapters[name].joint_losses(state.context.left)
        if name in state.adapters and state.adapters[name].trainable:
            chosen += state.adapters[name].penalties()
    return torch.stack([v.float() for v in chosen]).sum() if chosen else None


def log_probability(model: nn.Module, adapter: str) -> Tensor | None:
    """Return the log-probability of all routes that an adapter drew in the last pass, summed over its sites, or None.

    It has one entry for each of the adapter's rows, in their order in the batch. A loss made of it trains the router
    as a policy; see `lorry.methods.parts.routing.leave_one_out`.
    """
    left = state_of(model).context.left
    found = [v for (owner, _, name), v in left.items() if owner == adapter and name == "log_probability"]
    if not found:
        return None
    # layers that see the tokens flattened left one entry for each token, row after row
    rows = min(len(v) for v in found)
    return torch.stack([v.unflatten(0, (rows, -1)).sum(1) for v in found]).sum(0)


def adapters(model: nn.Module) -> dict[str, Adapter]:
    """Return the adapters on a model by name; none is no error."""
    return dict(open_state(model).adapters)


def methods() -> dict[str, MethodInfo]:
    """Return every method that Lorry knows, by slug."""
    return registered()
