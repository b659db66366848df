"""An adapter's tensors at one site, and where they live."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from lorry.core.method.base import Method
from lorry.core.method.spec import TensorSpec
from lorry.core.sites.site import Site

#: Mark of parameters that keep their type when their module is cast.
KEEPS_TYPE = "_lorry_keeps_type"


class Keeper(Protocol):
    """Keeps the tensors of an adapter elsewhere than in its homes; see `lorry.core.life.placement`."""

    def ready(self, home: TensorHome) -> dict[str, Tensor]:
        """Return the tensors of a home on the device where they are needed; called without any lock."""

    def lying(self, home: TensorHome) -> dict[str, Tensor]:
        """Return the tensors of a home wherever they lie."""

    def bring(self, home: TensorHome, device: torch.device) -> None:
        """Get the tensors of a home ready for computing on `device`."""

    def take_back(self) -> None:
        """Give all homes of the adapter their tensors back, so that these can be exchanged or trained."""

    def exchanged(self) -> None:
        """Take note that a tensor of a home is another one now."""


class TensorHome:
    """A named set of tensors that may be registered as parameters of a module.

    Tensors of a frozen adapter are kept here alone, so that thousands of loaded adapters leave the module tree as it
    is. Those of an adapter in training are parameters of the module too (optimizers, DDP and FSDP2 find them there,
    and may replace them, which is why they are looked up again at each use); the module's state dict leaves them out.
    Where a placement decides, a frozen adapter's tensors may lie with its keeper; it is asked whenever they are needed.

    Attributes
    ----------
    specs
        What the method says of its tensors, by name.
    keeper
        Who keeps the tensors while they are not here; None if they always are.
    """

    __slots__ = ("_keys", "_module", "_values", "keeper", "specs")

    def __init__(self, specs: Mapping[str, TensorSpec], values: dict[str, Tensor]) -> None:
        self.specs = dict(specs)
        self.keeper: Keeper | None = None
        self._values: dict[str, Tensor] | None = values
        self._module: nn.Module | None = None
        self._keys: dict[str, str] = {}

    def __getstate__(self) -> tuple[None, dict[str, Any]]:
        """Return what a copy takes along: the tensors themselves, and no keeper."""
        state = {name: getattr(self, name) for name in self.__slots__}
        if self._values is None:
            state["_values"] = self.tensors()
        return None, {**state, "keeper": None}

    def tensors(self) -> dict[str, Tensor]:
        """Return the current tensors by name, wherever they lie."""
        if self._module is not None:
            return self._with_parameters()
        keeper, values = self.keeper, self._values  # in this order: whoever lets go of them puts them here first
        return self._kept(keeper).lying(self) if values is None else values

    def ready(self) -> dict[str, Tensor]:
        """Return the current tensors by name, for computing: on the device of the site.

        Where there is no room for the adapter they may be copies, so they are to be read only.
        """
        if self._module is not None:
            return self._with_parameters()
        keeper, values = self.keeper, self._values
        if values is not None and (keeper is None or torch.compiler.is_compiling()):
            return values
        return self._kept(keeper).ready(self)

    def _with_parameters(self) -> dict[str, Tensor]:
        assert self._module is not None
        parameters = cast(dict[str, Tensor], self._module._parameters)
        return {**self._own(), **{name: parameters[key] for name, key in self._keys.items()}}

    def _own(self) -> dict[str, Tensor]:
        """Return the tensors that are here, after fetching them if they are not."""
        if self._values is None:
            self._kept(self.keeper).take_back()
        assert self._values is not None
        return self._values

    def _kept(self, keeper: Keeper | None) -> Keeper:
        assert keeper is not None
        return keeper

    @property
    def resident(self) -> dict[str, Tensor] | None:
        """The tensors that are here; None while they are with the keeper."""
        return self._values

    def settle(self, values: dict[str, Tensor] | None) -> None:
        """Let the tensors be here from now on, or (None) with the keeper."""
        self._values = values

    def replace(self, name: str, value: Tensor) -> None:
        """Put another tensor in the place of one that is not registered."""
        self._own()[name] = value
        if self.keeper is not None:
            self.keeper.exchanged()

    @property
    def registered(self) -> bool:
        """Whether trained tensors are parameters of a module."""
        return self._module is not None

    def register(self, module: nn.Module, prefix: str) -> None:
        """Make the trained tensors parameters of `module` under names that begin with `prefix`."""
        values = self._own()
        for name, spec in self.specs.items():
            if not spec.trained:
                continue
            key = f"{prefix}{name}".replace(".", "/")  # a parameter's name has no dots, an adapter's no slashes
            value = values[name]
            if self.keeper is not None and value.untyped_storage().nbytes() != value.nbytes:
                value = value.clone()  # a parameter does not hold the memory of others
            parameter = value if isinstance(value, nn.Parameter) else nn.Parameter(value.detach())
            parameter.requires_grad_(True)
            parameter.__dict__[KEEPS_TYPE] = spec.dtype is not None
            module._parameters[key] = parameter
            values[name] = parameter
            self._keys[name] = key
        self._module = module
        if self.keeper is not None:
            self.keeper.exchanged()

    def unregister(self) -> None:
        """Take the parameters out of their module again; the tensors stay, frozen."""
        if self._module is None:
            return
        values = self._own()
        for name, key in self._keys.items():
            parameter = self._module._parameters.pop(key)
            assert parameter is not None
            parameter.grad = None
            values[name] = parameter.detach()
        self._module, self._keys = None, {}
        if self.keeper is not None:
            self.keeper.exchanged()

    def move(self, device: torch.device) -> None:
        """Move tensors that are not registered to `device`."""
        keeper = self.keeper
        if keeper is not None and self._module is None:
            keeper.bring(self, device)
        values = self._values
        if values is None:
            return
        for name, value in values.items():
            if name not in self._keys and value.device != device:
                with torch.inference_mode(False):  # they may be trained later, whatever runs now
                    values[name] = value.to(device)


class Entry:
    """One adapter at one site: the method there, and its tensors together with those that its sites share.

    Attributes
    ----------
    name
        Of the adapter.
    site
        Where.
    method
        The method at this site.
    home
        The site's own tensors.
    shared
        Tensors that the adapter's sites share, if this one uses any.
    """

    __slots__ = ("home", "method", "name", "shared", "site")

    def __init__(self, name: str, site: Site, method: Method, home: TensorHome, shared: TensorHome | None) -> None:
        self.name = name
        self.site = site
        self.method = method
        self.home = home
        self.shared = shared

    def tensors(self) -> Mapping[str, Tensor]:
        """Return the tensors that the method's functions read: the site's own, and the shared ones if it shares."""
        own = self.home.ready()
        return own if self.shared is None else {**self.shared.ready(), **own}

    @property
    def frozen(self) -> bool:
        """Whether no gradient reaches its tensors."""
        return not self.home.registered and (self.shared is None or not self.shared.registered)

    def move(self, device: torch.device) -> None:
        """Follow the model to another device."""
        self.home.move(device)
        if self.shared is not None:
            self.shared.move(device)

    def delta(self) -> Tensor:
        """Return the weight update ``(*lead, out, in)``."""
        return self.method.delta(self.tensors(), self.site)


class Member(Protocol):
    """What a forward pass needs to know of an adapter."""

    @property
    def name(self) -> str:
        """Unique on its model."""

    @property
    def entries(self) -> Mapping[str, Entry]:
        """Site path -> the adapter there."""

    @property
    def in_base(self) -> bool:
        """Whether its update is part of the base weights now."""

    @property
    def trainable(self) -> bool:
        """Whether its tensors are parameters of the model that receive gradients."""


class Custodian(Protocol):
    """Who decides where the tensors of a model's adapters lie."""

    def took(self, adapter: Member) -> None:
        """Take charge of an adapter that the model gets; raises, and the model does not get it, if there is no room."""

    def lost(self, adapter: Member) -> None:
        """Let go of an adapter that the model had."""
