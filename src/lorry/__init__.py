"""Lorry carries LoRA adapters through their whole life: plan, train, study, merge, search, serve, switch, transfer.

The names are those of `lorry.face`, which is imported, and torch with it, when the first of them is asked for: a
program that only wants to say its version or its help does not wait for them.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from lorry.core.registry import import_first
from lorry.kernels import vision

if TYPE_CHECKING:
    from lorry.face import *  # noqa: F403
    from lorry.face import __all__ as __all__

__version__ = "0.1.0"

#: Whoever looks up a method or a format finds them all, whichever part of the library was imported before.
import_first("lorry.face")
#: transformers and diffusers import torchvision where it is installed, also a build for another torch.
vision.watch()


def __getattr__(name: str) -> Any:
    """Find a name of the public face, which is imported now, or a method's class by its name."""
    if name == "face" or (name.startswith("_") and name != "__all__"):  # the former while it is being imported
        raise AttributeError(f"module 'lorry' has no attribute '{name}'")
    from lorry import face

    found = getattr(face, name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    from lorry import face

    return sorted({*globals(), *face.__all__})


class _Package(types.ModuleType):
    """The package, whose attribute `methods` is the function and never the package of the methods' files."""

    @property
    def methods(self) -> Callable[..., Any]:
        """The function `lorry.core.life.api.methods`."""
        from lorry import face

        return face.methods

    @methods.setter
    def methods(self, package: types.ModuleType) -> None:
        """Let the import system put the package of this name where it likes: it stays in `sys.modules`."""


sys.modules[__name__].__class__ = _Package
