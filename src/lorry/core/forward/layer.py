"""What the paths of a forward pass know of an adapted module."""

from __future__ import annotations

import inspect
import zlib
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from lorry.core.errors import AdapterError
from lorry.core.forward.active import Term
from lorry.core.forward.entry import Member
from lorry.core.forward.runtime import Moment, Runtime
from lorry.core.sites.site import Site

Base = Callable[..., Any]
#: What applies in a call: the runtime of the thread or task, or a moment of it in a recomputation.
Now = Runtime | Moment


class Layer:
    """An adapted module.

    Attributes
    ----------
    owner
        The module.
    path
        Of its first site.
    sites
        Its sites; several where a module holds several weights.
    length_first
        Whether it is known to see positions before rows.
    adapters
        All adapters of the model by name.
    original
        The class that the module had.
    own_forward
        A forward that the module's instance had of its own, if any.
    """

    def __init__(self, owner: nn.Module, sites: list[Site], adapters: Mapping[str, Member]) -> None:
        self.owner = owner
        self.path = sites[0].path
        self.sites = sites
        self.adapters = adapters
        self.original = type(owner)
        self.length_first = False
        self.own_forward: Base | None = owner.__dict__.pop("forward", None)
        self.plain_linear = self.original.forward is nn.Linear.forward and self.own_forward is None

    @cached_property
    def input_name(self) -> str:
        """Name of the first argument of the module's own forward."""
        parameters = list(inspect.signature(self.own_forward or self.original.forward).parameters)
        own = parameters if self.own_forward is not None else parameters[1:]
        return own[0] if own else ""

    def input(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
        """Return the input, however it was passed.

        Raises
        ------
        AdapterError
            There is none, or it is no tensor.
        """
        found = args[0] if args else kwargs.get(self.input_name)
        if not isinstance(found, Tensor):
            raise AdapterError(
                f"'{self.sites[0].path}' takes a tensor as '{self.input_name}', found {type(found).__name__}."
            )
        return found

    def with_input(
        self, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the arguments with another input."""
        return ((x, *args[1:]), kwargs) if args else (args, {**kwargs, self.input_name: x})


def seed_of(term: Term) -> int:
    """Return a call's seed: from the portion if the engine gave one, else from torch's global generator."""
    if term.seed is None:
        return int(torch.randint(0, 2**62, ()).item())
    mark = zlib.crc32(term.entry.site.path.encode())
    return (term.seed * 0x9E3779B97F4A7C15 + mark * 0xBF58476D1CE4E5B9) % 2**63
