"""Full training of whole modules beside an adapter (a head, an embedding): copies, the base keeps its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Generator, Tensor

from lorry.core.forward.exchange import exchanged
from lorry.core.method.call import Call
from lorry.core.method.families import Block
from lorry.core.method.registry import register
from lorry.core.method.spec import Tensors, TensorSpec
from lorry.core.sites.site import Site


@register("full", paper="none", kinds=lambda kind: kind.whole)
@dataclass(frozen=True)
class Full(Block):
    """``y = f(x; θ')`` in place of ``f(x; θ)``: every parameter of a module is trained in a copy that takes the
    original's place while the adapter is active.

    Use it for new heads and embeddings, which have nothing to be adapted, or as the yardstick that an adapter is
    held against.
    """

    whole: ClassVar[bool] = True

    def tensors(self, site: Site) -> dict[str, TensorSpec]:
        """Return a copy of each parameter of the module."""
        own = site.owner.named_parameters()
        return {name: TensorSpec(tuple(p.shape)) for name, p in own if "lorry_" not in name}

    def setup(self, tensors: dict[str, Tensor], site: Site, generator: Generator) -> None:
        """Start from the module's own values."""
        for name, value in tensors.items():
            value.copy_(site.owner.get_parameter(name))

    def forward(self, base: Callable[..., Any], call: Call, tensors: Tensors, *args: Any, **kwargs: Any) -> Any:
        """Run the module with the trained values in place of its own."""
        pairs = []
        for name, value in tensors.items():
            path, _, leaf = name.rpartition(".")
            holder = call.site.owner.get_submodule(path)
            pairs.append((holder, leaf, value.to(getattr(holder, leaf).dtype)))
        with exchanged(pairs):
            return base(*args, **kwargs)
