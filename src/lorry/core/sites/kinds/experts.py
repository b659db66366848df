"""Banks of experts."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn

from lorry.core.sites.site import Kind, Site, register_kind


@register_kind
class ExpertsKind(Kind):
    """Three-dimensional parameters ``(experts, out, in)``, or ``(experts, in, out)`` where the module says so."""

    name = "experts"
    priority = 30
    presets = ("experts",)
    additive = False

    def sites(self, path: str, module: nn.Module) -> Iterator[Site]:
        """Yield every floating three-dimensional parameter of a module that is named or typed as experts."""
        if "expert" not in type(module).__name__.lower():
            return
        for name, weight in module.named_parameters(recurse=False):
            if weight.ndim == 3 and not name.startswith("lorry_"):
                experts, rows, columns = weight.shape
                out, inner = (columns, rows) if self._transposed(module) else (rows, columns)
                yield Site(f"{path}.{name}", self, module, module, name, out, inner, lead=(experts,))

    @staticmethod
    def _transposed(module: nn.Module) -> bool:
        return bool(getattr(module, "is_transposed", False))

    def to_matrix(self, site: Site, weight: Tensor) -> Tensor:
        """Transpose each expert's matrix if the bank stores ``(in, out)``."""
        return weight.transpose(-1, -2) if self._transposed(site.owner) else weight

    def to_weight(self, site: Site, matrix: Tensor) -> Tensor:
        """Undo `to_matrix`."""
        return matrix.transpose(-1, -2) if self._transposed(site.owner) else matrix

    def bias(self, site: Site) -> Tensor | None:
        """Return None: the owner's biases do not belong to one weight."""
        return None
