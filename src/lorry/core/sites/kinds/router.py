"""Routers of experts that hold their matrix themselves."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn

from lorry.core.sites.site import Kind, Site, register_kind


@register_kind
class RouterKind(Kind):
    """The matrix ``(experts, in)`` of a module that is typed as a router and multiplies by it itself, beside a softmax
    or a choice; a router that is a linear layer is one.
    """

    name = "router"
    priority = 25
    presets = ("routers",)
    in_all = False
    additive = False

    def sites(self, path: str, module: nn.Module) -> Iterator[Site]:
        """Yield the weight of a router that is no layer of another kind."""
        if "router" not in type(module).__name__.lower() or isinstance(module, nn.Linear):
            return
        weight = module._parameters.get("weight")
        if weight is not None and weight.ndim == 2:
            yield Site(f"{path}.weight", self, module, module, "weight", *weight.shape)

    def bias(self, site: Site) -> Tensor | None:
        """Return None: what a router adds to its scores does not belong to the matrix."""
        return None
