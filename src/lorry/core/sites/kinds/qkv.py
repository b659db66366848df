"""Attention modules that hold the matrices of queries, keys and values themselves."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn

from lorry.core.sites.site import Kind, Site, register_kind


@register_kind
class QkvKind(Kind):
    """The joint q/k/v matrix and the output projection of ``nn.MultiheadAttention``, which never calls its
    children.
    """

    name = "qkv"
    aliases = ("packed",)
    priority = 20
    presets = ("all-linear",)
    additive = False

    def sites(self, path: str, module: nn.Module) -> Iterator[Site]:
        """Yield ``in_proj_weight`` (or the three separate matrices) and ``out_proj``."""
        if not isinstance(module, nn.MultiheadAttention):
            return
        for name in ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight"):
            weight = getattr(module, name)
            if weight is not None:
                yield Site(f"{path}.{name}", self, module, module, name, *weight.shape)
        out = module.out_proj
        yield Site(f"{path}.out_proj", self, module, out, "weight", out.out_features, out.in_features)

    def bias(self, site: Site) -> Tensor | None:
        """Return None: the owner's biases do not belong to one weight."""
        return None
