"""What Lorry keeps of one model: its sites, its adapters, what is in its weights. Reached from the model.

What applies in a forward pass belongs to the thread or task that runs it; see `lorry.core.forward.runtime`.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from lorry.core.errors import AdapterError, SiteError
from lorry.core.forward.active import Active
from lorry.core.forward.adapted import PREFIX, link_of
from lorry.core.forward.compiled import uniform_form
from lorry.core.forward.compose import Composition, compose, for_all, for_rows
from lorry.core.forward.entry import Custodian, Member
from lorry.core.forward.fusion import without_fusion
from lorry.core.forward.link import Link
from lorry.core.forward.orientation import length_first
from lorry.core.forward.root import RootHooks
from lorry.core.forward.runtime import UNIFORM_FORM, Runtime, Runtimes, Scope
from lorry.core.life.base_edits import BaseEdits
from lorry.core.life.fit import misfit
from lorry.core.method.context import Context
from lorry.core.method.layout import BatchLayout
from lorry.core.sites.fingerprint import Fingerprint, FingerprintCache, fingerprint
from lorry.core.sites.kinds import catalogue
from lorry.core.sites.site import Site

_KEY = "_lorry_state"
#: Compositions that are kept ready for the next time.
_KEPT = 64


class ModelState:
    """The adapters of one model.

    Attributes
    ----------
    root
        The model.
    adapters
        All adapters by name.
    runtimes
        What applies, for each thread or task.
    edits
        What is in the base weights now.
    custodian
        Who decides where the adapters' tensors lie, if the user asked for a placement.
    catalogue
        All layers of known kinds by path.
    unfit
        Why some of them are no sites: they do not compute what their kind says.
    sites
        All sites of the model by path.
    compiled
        Whether compositions get a form for compiled graphs.
    """

    def __init__(self, root: nn.Module) -> None:
        self.root = root
        self.adapters: dict[str, Member] = {}
        self.runtimes = Runtimes()
        self.edits = BaseEdits()
        self.custodian: Custodian | None = None
        self.compiled = False
        self.catalogue: dict[str, Site] = catalogue(root)
        reasons = {path: misfit(site) for path, site in self.catalogue.items()}
        self.unfit: dict[str, str] = {path: reason for path, reason in reasons.items() if reason}
        self.sites: dict[str, Site] = {p: s for p, s in self.catalogue.items() if p not in self.unfit}
        self._links: dict[str, Link] = {}
        self.hashes = FingerprintCache()
        self._composed: OrderedDict[tuple[Any, ...], Active] = OrderedDict()
        self._combined: dict[str, set[str]] = {}  # adapters that read others -> which
        self._thawed: dict[str, bool] = {}
        self._fused: list[tuple[nn.Module, str, Any]] = []
        self._hooks = RootHooks(self.runtimes, self._links)
        self._lock, self._composing = threading.RLock(), threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy of the model takes along: no caches."""
        return {**self.__dict__, "_composed": OrderedDict(), "_lock": None, "_composing": None, "custodian": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take up what a copy brought along."""
        self.__dict__.update(state)
        self._lock, self._composing = threading.RLock(), threading.Lock()

    # -- what applies here

    @property
    def active(self) -> Active | None:
        """What applies in this thread or task; None for the bare base."""
        return self.runtimes.current().active

    @active.setter
    def active(self, active: Active | None) -> None:
        self.choose(active)

    @property
    def context(self) -> Context:
        """What the present forward pass of this thread or task knows."""
        return self.runtimes.current().context

    @context.setter
    def context(self, context: Context) -> None:
        self.runtimes.own().set_context(context)

    def lasting(self, active: Active | None) -> Active | None:
        """Return a composition without the adapters that were detached since it was made."""
        for portion in () if active is None else active.portions:
            if active is not None and self.adapters.get(portion.adapter.name) is not portion.adapter:
                active = active.without(portion.adapter)
        return active

    @property
    def fused(self) -> list[str]:
        """Names of the adapters that are in the base weights, in the order in which they got there."""
        return self.edits.names

    def passed_by(self, sites: Iterable[Site]) -> list[str]:
        """Return the paths of those sites whose weights something reads past the layer, as far as passes have shown."""
        return [site.path for site in sites if site.path in self._hooks.passed_by]

    def untried(self, sites: Iterable[Site]) -> list[str]:
        """Return the paths of those sites of which no pass has told yet whether they run, each once."""
        return self._hooks.untried(site.path for site in sites)

    def choose(self, active: Active | None) -> None:
        """Let an active set apply from now on: here, and wherever nothing was chosen."""
        self.runtimes.choose(active)
        self.runtimes.publish(self.runtimes.own())

    def enter(self, active: Active | None) -> tuple[Runtime, Scope]:
        """Let an active set apply here until `leave`."""
        runtime = self.runtimes.own()
        scope = runtime.enter(active)
        self.runtimes.publish(runtime)
        return runtime, scope

    def leave(self, runtime: Runtime, scope: Scope) -> None:
        """End what `enter` began, in whatever order."""
        runtime.leave(scope)
        self.runtimes.publish(runtime)

    def composed(self, composition: str | Composition | None) -> Active | None:
        """Return a composition for all rows, kept for the next time if its weights are numbers."""
        self._notice_compiling()
        asked = compose(composition, self.adapters)
        for name, weight, _ in asked:
            if self.adapters[name].in_base and not (isinstance(weight, float) and weight == self.edits.weight(name)):
                raise AdapterError(
                    f"Adapter '{name}' is fused with weight {self.edits.weight(name):g}; unfuse it before activating "
                    f"it with {weight if isinstance(weight, float) else 'another weight'}."
                )
        if not all(isinstance(weight, float) for _, weight, _ in asked):
            return for_all(composition, self.adapters)
        key = tuple(asked)
        active = self._composed.get(key)
        if active is None and key:
            active = for_all(composition, self.adapters)
            assert active is not None
            self._with_form(active)
            with self._composing:  # nothing else is done under it, so that it waits for no other lock
                self._composed[key] = active
                while len(self._composed) > _KEPT:
                    self._composed.popitem(last=False)
        return active

    def drop_composed(self, name: str | None = None) -> list[Active]:
        """Forget the kept compositions that an adapter takes part in, or all of them; return them."""
        with self._composing:
            dropped = {k: a for k, a in self._composed.items() if name is None or name in a.members}
            for key in dropped:
                del self._composed[key]
        return list(dropped.values())

    def rows(
        self,
        compositions: Sequence[str | Composition | None],
        seeds: Mapping[str, int] | None = None,
        layout: BatchLayout | None = None,
    ) -> Active:
        """Return the active set in which each row has its own composition.

        Raises
        ------
        AdapterError
            An adapter is in the base, an unknown one, or a bad weight.
        """
        if self.edits.names:
            raise AdapterError(
                f"Adapter '{self.edits.names[0]}' is fused into the base, or switched on there, and would apply to "
                "every row; unfuse it first."
            )
        self._notice_compiling()
        return self._with_form(for_rows(compositions, self.adapters, seeds, layout))

    def check_fuse(self, name: str, weight: float) -> None:
        """Raise `AdapterError` if an adapter in the base with `weight` would change what is in force somewhere."""
        for active in (active for runtime in self.runtimes.every() for active in runtime.actives()):
            if active.layout is not None:
                raise AdapterError(
                    f"lorry.rows is in force, and adapter '{name}' would apply to every row once it is in the base. "
                    "Leave the block first."
                )
            for portion in active.portions:
                same = portion.kind is None and isinstance(portion.weight, float) and portion.weight == weight
                if portion.adapter.name == name and not same:
                    raise AdapterError(
                        f"Adapter '{name}' is active with another weight than the {weight:g} with which it would be in "
                        "the base. Activate it with that weight, or lorry.activate(model, None), before."
                    )

    def changed(self) -> None:
        """Forget what was worked out before an adapter was removed, put into the base, or registered anew."""
        self.drop_composed()
        own = self.runtimes.own()
        for runtime in self.runtimes.every():
            runtime.refresh(runtime is own)
            for active in runtime.actives():
                self._with_form(active)
        self.runtimes.publish(own)

    # -- adapters

    @property
    def base_name(self) -> str:
        """What people call the base: the repository or folder it came from, else its class."""
        config = getattr(self.root, "config", None)
        return str(getattr(config, "_name_or_path", "") or type(self.root).__name__)

    def fingerprint(self, sites: Iterable[Site]) -> Fingerprint:
        """Return the fingerprint of some sites, of the base without what is in it now."""
        # what was written in place has its hashes held; whole weights are put back for as long as they are read
        with self.edits.bare(in_place=False):
            return fingerprint(sites, self.base_name, self.hashes)

    def add(self, adapter: Member) -> None:
        """Take an adapter in: link its sites and freeze the base at the first one."""
        with self._lock:
            if self.custodian is not None:
                self.custodian.took(adapter)
            if not self.adapters:
                self._freeze()
                self._hooks.install(self.root)
            self.adapters = {**self.adapters, adapter.name: adapter}
            if members := _members(adapter):
                self._combined[adapter.name] = members
            for link in self._links.values():
                link.adapters = self.adapters
            self.link(entry.site for entry in adapter.entries.values())

    def link(self, sites: Iterable[Site]) -> None:
        """Let modules ask what applies to them."""
        owners: dict[int, list[Site]] = {}
        for site in sites:
            link = link_of(site.owner)
            if link is None:
                owners.setdefault(id(site.owner), []).append(site)
            elif site.path not in {s.path for s in link.sites}:
                link.sites.append(site)
        for found in owners.values():
            link = self._links[found[0].path] = Link(found[0].owner, found, self.adapters, self.runtimes)
            link.length_first = length_first(self.root, found[0].path)
        if owners:
            self._fused += without_fusion(self.root)

    def check_owners(self, sites: Iterable[Site]) -> None:
        """Raise `SiteError` if a site belongs to another state, or if a module would have to be two kinds of site."""
        kinds: dict[int, str] = {}
        for site in sites:
            link = link_of(site.owner)
            kind = link.sites[0].kind.name if link is not None else kinds.setdefault(id(site.owner), site.kind.name)
            if kind != site.kind.name:
                raise SiteError(
                    f"'{site.path}' would carry adapters as {kind} and as {site.kind.name} site. Train the module "
                    "whole in all adapters (train_also), or in none."
                )
            if link is not None and link.runtimes is not self.runtimes:
                raise SiteError(
                    f"'{site.path}' already carries adapters that were attached to a part or a parent of this model. "
                    "Attach all adapters to the same object."
                )

    def check_members(self, adapter: Member) -> None:
        """Raise `AdapterError` if an adapter reads others that are not here or do not sit on its sites."""
        for path, entry in adapter.entries.items():
            for name in entry.method.members:
                other = self.adapters.get(name)
                if other is None or path not in other.entries:
                    where = "is not loaded on this model" if other is None else f"does not sit on '{path}'"
                    raise AdapterError(
                        f"Adapter '{adapter.name}' combines '{name}', which {where}. Load its members on the same "
                        "sites first."
                    )

    def remove(self, adapter: Member) -> None:
        """Forget an adapter; with the last one the model is what it was."""
        with self._lock:
            user = next((name for name, read in self._combined.items() if adapter.name in read), None)
            if user is not None:
                raise AdapterError(f"Adapter '{adapter.name}' is combined by '{user}'; detach '{user}' first.")
            self._combined.pop(adapter.name, None)
            self.adapters = {n: a for n, a in self.adapters.items() if a is not adapter}
            for link in self._links.values():
                link.adapters = self.adapters
            own = self.runtimes.own()
            for runtime in self.runtimes.every():
                runtime.drop(adapter, runtime is own)
            self.changed()
            if self.custodian is not None:
                self.custodian.lost(adapter)
            if not self.adapters:
                self._release()

    def _release(self) -> None:
        """Give the model back what it had before the first adapter."""
        for link in self._links.values():
            link.remove()
        self._links.clear()
        self._hooks.remove()
        for module, attribute, value in self._fused:
            module.__dict__[attribute] = value
        self._fused = []
        for name, parameter in self.root.named_parameters():
            if name in self._thawed:
                parameter.requires_grad_(True)
        if self.custodian is None:  # what was said of places holds for the adapters that come next
            self.root.__dict__.pop(_KEY, None)

    def _freeze(self) -> None:
        # parameters of adapters on a part of this model are left as they are
        base = {n: p for n, p in self.root.named_parameters() if not n.rpartition(".")[2].startswith(PREFIX)}
        self._thawed = {n: True for n, p in base.items() if p.requires_grad}
        for parameter in base.values():
            parameter.requires_grad_(False)

    # -- compiled graphs

    def _with_form(self, active: Active) -> Active:
        """Return an active set with its form for compiled graphs, where there are any."""
        # of several adapters the form is a copy, which would not follow the steps of those in training
        live = active.layout is None and len(active.portions) > 1 and any(p.adapter.trainable for p in active.portions)
        if self.compiled and not live:
            active.kept[UNIFORM_FORM] = uniform_form(active, [link.sites[0] for link in self._links.values()])
        return active

    def _notice_compiling(self) -> None:
        """See whether ``model.compile()`` was called meanwhile."""
        if getattr(self.root, "_compiled_call_impl", None) is not None:
            self.expect_compiled()

    def expect_compiled(self) -> None:
        """Prepare the form for compiled graphs from now on, for compositions that were worked out before too."""
        if not self.compiled:
            self.compiled = True
            self.changed()


def _members(adapter: Member) -> set[str]:
    return {name for entry in adapter.entries.values() for name in entry.method.members}


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the model inside DDP, `torch.compile` and similar wrappers."""
    while True:
        if isinstance(inner := model.__dict__.get("_modules", {}).get("_orig_mod"), nn.Module):
            existing = inner.__dict__.get(_KEY)
            if isinstance(existing, ModelState):
                existing.expect_compiled()
            model = inner
        elif type(model).__name__ in ("DistributedDataParallel", "FullyShardedDataParallel", "DataParallel"):
            model = model.module  # type: ignore[assignment]
        else:
            return model


def kept_state(model: nn.Module) -> ModelState | None:
    """Return the state of a model, or None if it carries no adapters."""
    state = unwrapped(model).__dict__.get(_KEY)
    return state if isinstance(state, ModelState) else None


def state_of(model: nn.Module) -> ModelState:
    """Return the state of a model that carries adapters.

    Raises
    ------
    AdapterError
        The model carries none.
    """
    state = kept_state(model)
    if state is None:
        raise AdapterError(
            f"This {type(unwrapped(model)).__name__} carries no adapters. Attach one with lorry.attach or load one "
            "with lorry.load."
        )
    return state


def open_state(model: nn.Module) -> ModelState:
    """Return the model's state, or a new one that is not yet kept by the model."""
    if not isinstance(model, nn.Module):
        raise SiteError(f"Expected a torch.nn.Module, found {type(model).__name__}.")
    state = kept_state(model)
    return ModelState(unwrapped(model)) if state is None else state


def keep_state(state: ModelState) -> None:
    """Let the model keep its state, from the first adapter on."""
    state.root.__dict__[_KEY] = state


def parameter_prefix(name: str) -> str:
    """Return how the parameters of an adapter are called inside their modules."""
    return f"{PREFIX}{name}:"
