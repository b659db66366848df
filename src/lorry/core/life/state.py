"""What Lorry keeps of one model: its sites, its adapters, what is active. One object, reached from the model and its
layers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import nn

from lorry.core.errors import AdapterError, SiteError
from lorry.core.forward.active import Active, Composition, Part, compose, for_rows
from lorry.core.forward.compiled import PACKED, Slot, pack
from lorry.core.forward.history import History
from lorry.core.forward.link import PREFIX, Adapted, Link, adapted_class, without_fusion
from lorry.core.method.call import Context
from lorry.core.sites.fingerprint import Fingerprint, FingerprintCache, fingerprint
from lorry.core.sites.kinds import catalogue
from lorry.core.sites.site import Site

if TYPE_CHECKING:
    from lorry.core.life.adapter import Adapter

_KEY = "_lorry_state"


class ModelState:
    """The adapters of one model.

    Attributes
    ----------
    root
        The model.
    adapters
        All adapters by name.
    active
        What applies now; None for the bare base.
    history
        What applied before, for the recomputation of checkpointed segments in a later backward pass.
    inside
        What applies inside a block that runs some rows of the batch alone.
    context
        What the present forward pass knows.
    """

    def __init__(self, root: nn.Module) -> None:
        self.root = root
        self.adapters: dict[str, Adapter] = {}
        self.slot = Slot()
        self._active: Active | None = None
        self._context = Context()
        self.history = History()
        self.history.note(None, self._context)
        self.inside: Active | None = None
        #: Names of merged adapters in the order in which they were merged.
        self.merged: list[str] = []
        self.compiled = False
        self.sites: dict[str, Site] = catalogue(root)
        self._links: dict[str, tuple[nn.Module, Link]] = {}
        self.hashes = FingerprintCache()
        self._composed: dict[tuple[tuple[str, float], ...], Active] = {}
        self._thawed: dict[str, bool] = {}
        self._fused: list[tuple[nn.Module, str, Any]] = []
        self._root_class: type[nn.Module] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy of the model takes along: no caches, nothing of a pass that is under way."""
        fresh: dict[str, Any] = {"_composed": {}, "inside": None, "_context": Context(), "history": History()}
        fresh["history"].note(self._active, fresh["_context"])
        return {**self.__dict__, **fresh}

    @property
    def active(self) -> Active | None:
        """What applies now; None for the bare base."""
        return self._active

    @active.setter
    def active(self, active: Active | None) -> None:
        self._active = active
        self.history.note(active, self._context)
        PACKED[self.slot.number] = None if active is None else active.packed

    @property
    def context(self) -> Context:
        """What the present forward pass knows."""
        return self._context

    @context.setter
    def context(self, context: Context) -> None:
        self._context = context
        self.history.note(self._active, context)

    @property
    def base_name(self) -> str:
        """What people call the base: the repository or folder it came from, else its class."""
        config = getattr(self.root, "config", None)
        return str(getattr(config, "_name_or_path", "") or type(self.root).__name__)

    def fingerprint(self, sites: Iterable[Site]) -> Fingerprint:
        """Return the fingerprint of some sites, taken before anything was merged into them."""
        return fingerprint(sites, self.base_name, self.hashes)

    def add(self, adapter: Adapter) -> None:
        """Take an adapter in: link its sites and freeze the base at the first one."""
        if not self.adapters:
            self._freeze()
        self.adapters[adapter.name] = adapter
        owners: dict[int, list[Site]] = {}
        for entry in adapter.entries.values():
            if "_lorry_link" not in entry.site.owner.__dict__:
                owners.setdefault(id(entry.site.owner), []).append(entry.site)
            elif entry.site.path not in {s.path for s in entry.site.owner.__dict__["_lorry_link"].sites}:
                link: Link = entry.site.owner.__dict__["_lorry_link"]
                link.add(entry.site)
        for sites in owners.values():
            owner = sites[0].owner
            self._links[sites[0].path] = (owner, Link(self, owner, sites))
        if owners:
            self._fused += without_fusion(self.root)
        if adapter.shared is not None and not isinstance(self.root, Adapted):
            # shared tensors are parameters of the root, whose state dict has to leave them out too
            self._root_class = type(self.root)
            self.root.__class__ = adapted_class(self._root_class)

    def check_owners(self, sites: Iterable[Site]) -> None:
        """Raise `SiteError` if a site belongs to another state, or if a module would have to be two kinds of site."""
        kinds: dict[int, str] = {}
        for site in sites:
            link = site.owner.__dict__.get("_lorry_link")
            kind = link.sites[0].kind.name if link is not None else kinds.setdefault(id(site.owner), site.kind.name)
            if kind != site.kind.name:
                raise SiteError(
                    f"'{site.path}' would carry adapters as {kind} and as {site.kind.name} site. Train the module "
                    "whole in all "
                    "adapters (train_also), or in none."
                )
            if link is not None and link.state is not self:
                raise SiteError(
                    f"'{site.path}' already carries adapters attached to {type(link.state.root).__name__}, a part or "
                    "a parent "
                    "of this model. Attach all adapters to the same object."
                )

    def remove(self, adapter: Adapter) -> None:
        """Forget an adapter; with the last one the model is what it was."""
        if self.active is not None and any(p.adapter is adapter for p in self.active.parts):
            others = [p for p in self.active.parts if p.adapter is not adapter]
            self.active = Active(others, self.active.rows) if others else None
        self.last_active = None
        del self.adapters[adapter.name]
        self.changed()
        if not self.adapters:
            for owner, link in self._links.values():
                link.remove(owner)
            self._links.clear()
            for module, attribute, value in self._fused:
                module.__dict__[attribute] = value
            if self._root_class is not None:
                self.root.__class__ = self._root_class
            self._thaw()
            self.root.__dict__.pop(_KEY, None)

    def changed(self) -> None:
        """Forget compositions worked out before an adapter was removed, merged or registered anew."""
        self._composed.clear()
        self.history.clear()
        self.active = None if self._active is None else self._fresh(self._active)

    def _fresh(self, active: Active) -> Active:
        return self._packed(Active(active.parts, active.rows))

    def activate(self, composition: str | Composition | None) -> None:
        """Let a composition of adapters apply to all rows; None for the bare base."""
        self._notice_compiling()
        weights = compose(composition, self.adapters)
        key = tuple(weights.items())
        active = self._composed.get(key)
        if active is None:
            for name, weight in key:
                if self.adapters[name].merged and weight != 1.0:
                    raise AdapterError(
                        f"Adapter '{name}' is merged with weight 1; unmerge it before activating it with {weight}."
                    )
            active = self._composed[key] = self._packed(Active([Part(self.adapters[n], w) for n, w in key]))
        self.active = active if key else None

    def rows(self, compositions: Sequence[str | Composition | None], seeds: Mapping[str, int] | None = None) -> Active:
        """Return the active set in which each row has its own composition."""
        merged = [n for n, a in self.adapters.items() if a.merged]
        if merged:
            raise AdapterError(
                f"Adapter '{merged[0]}' is merged into the base and would apply to every row; unmerge it first."
            )
        self._notice_compiling()
        return self._packed(for_rows(compositions, self.adapters, seeds))

    def _packed(self, active: Active) -> Active:
        # of several adapters the packed form is a copy, which would not follow the steps of those in training
        live = active.rows is None and len(active.parts) > 1 and any(p.adapter.trainable for p in active.parts)
        if self.compiled and not live:
            active.packed = pack(active, [link.sites[0] for _, link in self._links.values()])
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

    def _freeze(self) -> None:
        # parameters of adapters on a part of this model are left as they are
        base = {n: p for n, p in self.root.named_parameters() if not n.rpartition(".")[2].startswith(PREFIX)}
        self._thawed = {n: True for n, p in base.items() if p.requires_grad}
        for parameter in base.values():
            parameter.requires_grad_(False)

    def _thaw(self) -> None:
        for name, parameter in self.root.named_parameters():
            if name in self._thawed:
                parameter.requires_grad_(True)


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


def state_of(model: nn.Module) -> ModelState:
    """Return the state of a model that carries adapters.

    Raises
    ------
    AdapterError
        The model carries none.
    """
    state = unwrapped(model).__dict__.get(_KEY)
    if not isinstance(state, ModelState):
        raise AdapterError(
            f"This {type(unwrapped(model)).__name__} carries no adapters. Attach one with lorry.attach or load one "
            "with lorry.load."
        )
    return state


def open_state(model: nn.Module) -> ModelState:
    """Return the model's state, or a new one that is not yet kept by the model."""
    model = unwrapped(model)
    if not isinstance(model, nn.Module):
        raise SiteError(f"Expected a torch.nn.Module, found {type(model).__name__}.")
    state = model.__dict__.get(_KEY)
    return state if isinstance(state, ModelState) else ModelState(model)


def keep_state(state: ModelState) -> None:
    """Let the model keep its state, from the first adapter on."""
    state.root.__dict__[_KEY] = state


def parameter_prefix(name: str) -> str:
    """Return how the parameters of an adapter are called inside their modules."""
    return f"{PREFIX}{name}:"
