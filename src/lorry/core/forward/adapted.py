"""The class of an adapted module: a subclass of its own whose forward asks the module's link.

The module keeps its identity, its paths, its `isinstance` relations and its storage; its class keeps its name and the
signature of its forward; its state dict leaves adapter tensors out.
"""

from __future__ import annotations

import contextlib
import copyreg
import functools
import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from lorry.core.forward.entry import KEEPS_TYPE

#: How the names of adapter tensors begin among a module's parameters.
PREFIX = "lorry_"
_LINK = "_lorry_link"
_CLASSES: dict[type[nn.Module], type[nn.Module]] = {}


class Adapted:
    """Mark of the classes that `adapted_class` makes."""


def adapted_class(cls: type[nn.Module]) -> type[nn.Module]:
    """Return the subclass of `cls` whose forward asks the module's link; one for each class."""
    if cls in _CLASSES:
        return _CLASSES[cls]

    class AdaptedMeta(type(cls)):  # type: ignore[misc]
        """Classes that are pickled as a note of the class that they stand for."""

    class AdaptedLayer(cls, Adapted, metaclass=AdaptedMeta):  # type: ignore[valid-type, misc]
        _lorry_original = cls

        @functools.wraps(cls.forward)
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            link = self.__dict__.get(_LINK)
            if link is None:  # a wrapper that was put around this forward outlived the adapter
                return cls.forward(self, *args, **kwargs)
            return link.forward(super().forward, args, kwargs)

        def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
            super()._save_to_state_dict(destination, prefix, keep_vars)
            for name in self._parameters:
                if name.startswith(PREFIX):
                    destination.pop(prefix + name, None)

        def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
            own = {n: self._parameters.pop(n) for n in list(self._parameters) if n.startswith(PREFIX)}
            try:
                super()._load_from_state_dict(*args, **kwargs)
            finally:
                self._parameters.update(own)

        def _apply(self, fn: Any, *args: Any, **kwargs: Any) -> Any:
            return super()._apply(functools.partial(_kept_type, fn), *args, **kwargs)

        def __reduce_ex__(self, protocol: Any) -> Any:
            return _rebuild, (cls,), dict(self.__dict__)

    for name in ("__name__", "__qualname__", "__module__", "__doc__"):
        setattr(AdaptedLayer, name, getattr(cls, name))
    with contextlib.suppress(ValueError, TypeError):  # a forward in C has none
        AdaptedLayer.forward.__signature__ = inspect.signature(cls.forward)  # type: ignore[attr-defined]
    copyreg.pickle(AdaptedMeta, _reduce_class)
    _CLASSES[cls] = AdaptedLayer
    return AdaptedLayer


def _kept_type(fn: Callable[[Tensor], Tensor], tensor: Tensor) -> Tensor:
    """Return what `fn` (a cast, a move) makes of a tensor; one that keeps its type is moved only."""
    made = fn(tensor)
    return tensor.to(made.device) if tensor.__dict__.get(KEEPS_TYPE) and made.dtype != tensor.dtype else made


def _rebuild(cls: type[nn.Module]) -> nn.Module:
    adapted = adapted_class(cls)
    return adapted.__new__(adapted)


def _reduce_class(adapted: Any) -> tuple[Any, tuple[type[nn.Module]]]:
    return adapted_class, (adapted._lorry_original,)


def link_of(module: nn.Module) -> Any:
    """Return the link of an adapted module, or None."""
    return module.__dict__.get(_LINK)
