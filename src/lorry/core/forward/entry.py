"""An adapter's tensors at one site, and where they live."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol, cast

import torch
from torch import Tensor, nn

from lorry.core.method.base import Method
from lorry.core.method.spec import TensorSpec
from lorry.core.sites.site import Site

#: Mark of parameters that keep their type when their module is cast.
KEEPS_TYPE = "_lorry_keeps_type"


class TensorHome:
    """A named set of tensors that may be registered as parameters of a module.

    Tensors of a frozen adapter are kept here alone, so that thousands of loaded adapters leave the module tree as it
    is. Those of an adapter in training are parameters of the module too (optimizers, DDP and FSDP2 find them there,
    and may replace them, which is why they are looked up again at each use); the module's state dict leaves them out.
    """

    __slots__ = ("_keys", "_module", "_values", "specs")

    def __init__(self, specs: Mapping[str, TensorSpec], values: dict[str, Tensor]) -> None:
        self.specs = dict(specs)
        self._values = values
        self._module: nn.Module | None = None
        self._keys: dict[str, str] = {}

    def tensors(self) -> dict[str, Tensor]:
        """Return the current tensors by name."""
        if self._module is None:
            return self._values
        parameters = cast(dict[str, Tensor], self._module._parameters)
        return {**self._values, **{name: parameters[key] for name, key in self._keys.items()}}

    def replace(self, name: str, value: Tensor) -> None:
        """Put another tensor in the place of one that is not registered."""
        self._values[name] = value

    @property
    def registered(self) -> bool:
        """Whether trained tensors are parameters of a module."""
        return self._module is not None

    def register(self, module: nn.Module, prefix: str) -> None:
        """Make the trained tensors parameters of `module` under names that begin with `prefix`."""
        for name, spec in self.specs.items():
            if not spec.trained:
                continue
            key = f"{prefix}{name}".replace(".", "/")  # a parameter's name has no dots, an adapter's no slashes
            value = self._values[name]
            parameter = value if isinstance(value, nn.Parameter) else nn.Parameter(value.detach())
            parameter.requires_grad_(True)
            parameter.__dict__[KEEPS_TYPE] = spec.dtype is not None
            module._parameters[key] = parameter
            self._values[name] = parameter
            self._keys[name] = key
        self._module = module

    def unregister(self) -> None:
        """Take the parameters out of their module again; the tensors stay, frozen."""
        if self._module is None:
            return
        for name, key in self._keys.items():
            parameter = self._module._parameters.pop(key)
            assert parameter is not None
            parameter.grad = None
            self._values[name] = parameter.detach()
        self._module, self._keys = None, {}

    def move(self, device: torch.device) -> None:
        """Move tensors that are not registered to `device`."""
        for name, value in self._values.items():
            if name not in self._keys and value.device != device:
                self._values[name] = value.to(device)


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
        own = self.home.tensors()
        return own if self.shared is None else {**self.shared.tensors(), **own}

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
