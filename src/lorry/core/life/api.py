"""The public verbs: attach, activate, rows, adapters, plan."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from lorry.core.errors import AdapterError, SiteError
from lorry.core.forward.active import Active
from lorry.core.forward.compose import Composition
from lorry.core.forward.runtime import Runtime, Scope
from lorry.core.forward.taps import Reader
from lorry.core.life import duties
from lorry.core.life.adapter import Adapter
from lorry.core.life.build import build
from lorry.core.life.state import ModelState, keep_state, kept_state, open_state, state_of
from lorry.core.method.base import Method, MethodInfo
from lorry.core.method.context import Context
from lorry.core.method.declared import whole_module
from lorry.core.method.layout import BatchLayout
from lorry.core.method.registry import method_from
from lorry.core.method.registry import methods as registered
from lorry.core.receipt import Receipt
from lorry.core.sites.kinds import KINDS
from lorry.core.sites.kinds.block import BLOCK
from lorry.core.sites.site import Site
from lorry.core.sites.targets import Layers, Selection, Targets, matches, select

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.\-]{0,127}")
SiteOptions = Mapping[str, Mapping[str, Any]]


def attach(
    model: nn.Module,
    method: Method | Mapping[str, Any] | str | None = None,
    *,
    targets: Targets = "all-linear",
    name: str = "default",
    seed: int = 0,
    exclude: Targets = (),
    layers: Layers | None = None,
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
        A method, or its slug, or ``{"method": slug, **options}``; LoRA if not given.
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
    left_out = selected(state, method, targets, exclude=exclude, layers=layers).left_out if state.unfit else {}
    notes = (*_ties(chosen), *(f"'{p}' was left out: {why}" for p, why in state.unfit.items() if left_out[p] == why))
    adapter.receipt = Receipt("attach", name, count, count, len(chosen), "match", notes=notes)
    return install(adapter, trainable=True, activate=activate)


def _ties(chosen: Sequence[tuple[Site, Method]]) -> Iterator[str]:
    """Yield a note for each site whose weight other places use too."""
    for site, _ in chosen:
        if site.tied:
            tied = ", ".join(site.tied)
            yield f"'{site.path}' shares its weight with {tied}; the adapter acts at '{site.path}' only"


def install(adapter: Adapter, *, trainable: bool, activate: bool) -> Adapter:
    """Let the model know an adapter that was built for it."""
    state = adapter.state
    state.check_members(adapter)
    keep_state(state)
    state.add(adapter)
    if trainable:
        adapter.train()
    if activate:
        # inside lorry.rows the rows stay as they are, and the adapter applies once they end
        state.choose(state.composed(adapter.name))
    return adapter


def check_name(name: str, state: ModelState) -> None:
    """Raise `AdapterError` unless `name` is well formed and free."""
    if not isinstance(name, str) or not _NAME.fullmatch(name) or name == "shared":
        raise AdapterError(
            "An adapter's name consists of letters, digits, '_', '-' and '.', begins with a letter or digit, and is "
            f"not 'shared'; found {name!r}."
        )
    if name in state.adapters:
        raise AdapterError(f"An adapter '{name}' is attached already. Detach it first, or choose another name.")


def selected(
    state: ModelState, method: Method, targets: Targets, *, exclude: Targets = (), layers: Layers | None = None
) -> Selection:
    """Return the sites that targets mean for a method, and why others are left out.

    Raises
    ------
    SiteError
        Nothing matches, or all that matches is left out.
    """
    kinds = (*method.info.kinds, *method.gathers)
    found = select(state.root, state.catalogue, targets, kinds=kinds, exclude=exclude, layers=layers)
    unfit = {site.path: state.unfit[site.path] for site in found.sites if site.path in state.unfit}
    if not unfit:
        return found
    left = tuple(site for site in found.sites if site.path not in unfit)
    if not left:
        path, reason = next(iter(unfit.items()))
        raise SiteError(
            f"No adapter can sit on '{path}': {reason}. Train the module whole (train_also), or choose other targets."
        )
    return Selection(left, {**found.left_out, **unfit})


def choose(
    state: ModelState,
    method: Method,
    targets: Targets,
    *,
    exclude: Targets = (),
    layers: Layers | None = None,
    site_options: SiteOptions | None = None,
) -> list[tuple[Site, Method]]:
    """Return the sites that targets mean, each with the method to use there, checked against each other."""
    selection = selected(state, method, targets, exclude=exclude, layers=layers)
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
        here.check_model(state.root, site)
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
        full = whole_module()
        modules = {p: m for p, m in state.root.named_modules() if p and matches(p, pattern)}
        if not modules:
            raise SiteError(f"train_also: '{pattern}' matches no module of {type(state.root).__name__}.")
        chosen += [(BLOCK.site(path, module), full) for path, module in modules.items()]
    return chosen


class Activation:
    """What `activate` returns: used in a ``with`` statement, the composition holds until the block ends."""

    def __init__(self, state: ModelState | None, active: Active | None, before: Active | None) -> None:
        self._state = state
        self._active = active
        self._before = before
        self._scope: tuple[Runtime, Scope] | None = None

    def __enter__(self) -> None:
        """Let what was active before be active again once the block ends.

        Raises
        ------
        AdapterError
            An adapter of the composition was detached meanwhile.
        """
        if self._state is None:
            return
        if self._state.lasting(self._active) is not self._active:
            raise AdapterError("An adapter of this composition was detached before the block was entered.")
        base = self._state.runtimes.own().base
        # what was chosen since `activate` was called stays chosen
        if (None if base is None else base.portions) is (None if self._active is None else self._active.portions):
            self._state.choose(self._state.lasting(self._before))
        self._scope = self._state.enter(self._active)

    def __exit__(self, *error: object) -> None:
        """End the block."""
        if self._state is not None and self._scope is not None:
            self._state.leave(*self._scope)


def activate(model: nn.Module, composition: str | Composition | None) -> Activation:
    """Let adapters apply to every row from now on, or while a ``with`` block lasts.

    It holds for the thread or task that calls it, and for every thread or task that has made no choice of its own.

    Parameters
    ----------
    model
        A model with adapters.
    composition
        A name, ``{name: weight, ...}`` (the weighted sum of the updates), ``{kind of token: composition}``, or None for
        nothing beside what is in the base weights. A weight is a number, a floating tensor (a scalar, or one entry for
        each row; gradients reach it), or a function of site, step and timestep; see `lorry.core.forward.weights`.

    Raises
    ------
    AdapterError
        An unknown adapter, a bad weight, or a ``with`` block that decides here.
    """
    state = kept_state(model)
    if state is None and composition is None:
        return Activation(None, None, None)
    state = state_of(model)
    runtime = state.runtimes.own()
    before = runtime.base
    if runtime.scoped:
        raise AdapterError(
            "lorry.rows, or a with-block of lorry.activate, decides what applies here. Leave the block first; or nest "
            "another lorry.rows."
        )
    state.choose(state.composed(composition))
    return Activation(state, state.active, before)


@contextmanager
def rows(
    model: nn.Module,
    compositions: Sequence[str | Composition | None],
    *,
    seeds: Mapping[str, int] | None = None,
    repeat: int | None = None,
    tile: int | None = None,
    lengths: Sequence[int] | None = None,
    counts: Mapping[str, Sequence[int]] | None = None,
) -> Iterator[None]:
    """Give each row of a batch its own composition of adapters while the context lasts, in training as in inference.

    Parameters
    ----------
    model
        A model with adapters.
    compositions
        For each row a composition, as `activate` takes it, or None for the bare base.
    seeds
        Adapter -> seed of its dropout in this pass; torch's global generator decides otherwise.
    repeat
        How often each row follows itself in what the model is given (a a b b): beams, several samples of a prompt.
    tile
        How often the whole batch follows itself (a b a b): classifier-free guidance. With `repeat`, the repeated batch.
    lengths
        Tokens of each row, where all rows lie one after another in one batch ``(1, tokens)``.
    counts
        Path of a module -> entries of each row in that part of the model, e.g. pictures in a vision tower.

    Raises
    ------
    AdapterError
        An unknown adapter, a bad weight, an adapter in the base; and in the model's forward a batch that does not fit,
        or of which several layouts fit.
    """
    state = state_of(model)
    layout = BatchLayout(
        len(compositions),
        repeat,
        tile,
        None if lengths is None else tuple(lengths),
        {path: tuple(each) for path, each in (counts or {}).items()},
    )
    runtime, scope = state.enter(state.rows(compositions, seeds, layout))
    try:
        yield
    finally:
        state.leave(runtime, scope)


@contextmanager
def context(model: nn.Module, /, **facts: Any) -> Iterator[Context]:
    """Tell methods what they may need of a forward pass, and collect what layers leave behind.

    Parameters
    ----------
    model
        A model with adapters.
    facts
        Fields of `lorry.core.method.context.Context` (``padding_mask``, ``token_kinds``, ``task_ids``, ``step``,
        ``timestep``, ``recording``); any other name goes into ``values``.
    """
    runtime = state_of(model).runtimes.own()
    known = {k: v for k, v in facts.items() if k in Context.__dataclass_fields__}
    fresh = replace(Context(), **known)
    fresh.values.update({k: v for k, v in facts.items() if k not in known})
    outer = runtime.context
    runtime.enter_context(fresh)
    try:
        yield fresh
    finally:
        runtime.leave_context(fresh, outer)
        for name in {owner for owner, _, _ in (*fresh.losses, *fresh.left)}:
            if name in (loaded := adapters(model)):
                duties.note_left(loaded[name])


@contextmanager
def tap(model: nn.Module, reader: Reader, targets: Targets = "all") -> Iterator[None]:
    """Let a reader see what passes sites, apart, while the context lasts, in this thread or task.

    Parameters
    ----------
    model
        A model with adapters.
    reader
        Called with a `lorry.core.forward.taps.Tap` for each call of a site: its input, the base's output, the update of
        each active adapter, and their sum. A tensor that it returns takes the place of the output.
    targets
        Which sites; see `lorry.core.sites.targets.select`. Sites without adapters may be tapped too.

    Raises
    ------
    SiteError
        Nothing matches, or a site whose weight a larger module uses itself.
    """
    state = state_of(model)
    chosen = select(state.root, state.sites, targets, kinds=tuple(KINDS)).sites
    wrong = next((site for site in chosen if not site.kind.additive), None)
    if wrong is not None and targets != "all":
        raise SiteError(
            f"'{wrong.path}' ({wrong.kind.name}) holds its weight for a larger module, so base and updates do not pass "
            "apart there. Leave it out."
        )
    chosen = tuple(site for site in chosen if site.kind.additive)
    state.link(chosen)
    runtime = state.runtimes.own()
    for site in chosen:
        runtime.taps.setdefault(site.path, []).append(reader)
    try:
        yield
    finally:
        for site in chosen:
            readers = runtime.taps[site.path]
            readers.remove(reader)
            if not readers:
                del runtime.taps[site.path]


def auxiliary_loss(model: nn.Module, adapter: str | None = None) -> Tensor | None:
    """Return the sum of the auxiliary losses that layers left in the last pass, or None if there are none.

    The penalties that methods put on the tensors of adapters in training are part of it.
    """
    context = state_of(model).context
    chosen = [value for (owner, _, _), value in context.losses.items() if adapter is None or owner == adapter]
    for name, owner in adapters(model).items():
        if adapter is not None and name != adapter:
            continue
        duties.attend(owner, duties.LOSSES)
        if any(key[0] == name for key in context.left):
            chosen += owner.joint_losses(context.left)
        if owner.trainable:
            chosen += owner.penalties()
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
    return cast(dict[str, Adapter], dict(open_state(model).adapters))


def methods() -> dict[str, MethodInfo]:
    """Return every method that Lorry knows, by slug."""
    return registered()
