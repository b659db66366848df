"""IA3: a trained factor for each output channel of a layer, or for each of its inputs."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from lorry.core.method.call import Call
from lorry.core.method.families import WeightDelta
from lorry.core.method.registry import register
from lorry.core.method.spec import Tensors, TensorSpec, ones
from lorry.core.options import option
from lorry.core.sites.site import Site


@register("ia3", paper="arXiv 2205.05638", kinds=("linear", "conv"))
@dataclass(frozen=True)
class IA3(WeightDelta):
    """``y = l ⊙ base(x)``, the bias included, or ``y = base(l ⊙ x)``, with l one at the start (section 3.3).

    The paper scales the outputs of keys and values, and the inputs of the second layer of feed-forward blocks.

    Use it for few examples and many tasks: a vector for each layer, and nothing is multiplied.
    """

    inputs: bool = option(False, "Scale the inputs (of a convolution, its channels) instead of the outputs.")

    def tensors(self, site: Site) -> dict[str, TensorSpec]:
        """Return the factors l ``(out,)`` or ``(in,)``; a convolution's inputs are its channels."""
        return {"gain": TensorSpec((self._channels(site) if self.inputs else site.out_features,), ones)}

    @staticmethod
    def _groups(site: Site) -> int:
        return int(getattr(site.owner, "groups", 1))

    def _channels(self, site: Site) -> int:
        return site.in_features // math.prod(site.kind.kernel(site)) * self._groups(site)

    def delta(self, tensors: Tensors, site: Site) -> Tensor:
        """Return ``(l - 1) ⊙ W`` by rows or by columns; each group of a convolution sees channels of its own."""
        change = tensors["gain"] - 1
        weight = site.matrix().to(change.dtype)
        if not self.inputs:
            return change.unsqueeze(-1) * weight
        window, groups = math.prod(site.kind.kernel(site)), self._groups(site)
        columns = change.view(groups, 1, -1).repeat_interleave(window, dim=-1)
        return (weight.unflatten(0, (groups, -1)) * columns).flatten(0, 1)

    def bias_delta(self, tensors: Tensors, site: Site) -> Tensor | None:
        """Return ``(l - 1) ⊙ bias`` where outputs are scaled."""
        bias = site.kind.bias(site)
        return None if self.inputs or bias is None else (tensors["gain"] - 1) * bias.to(tensors["gain"].dtype)

    def apply(self, call: Call, tensors: Tensors) -> Tensor:
        """Return ``(l - 1) ⊙ y``, or the layer's product with ``(l - 1) ⊙ x``."""
        site, kind = call.site, call.site.kind
        change = (tensors["gain"] - 1).to(call.output.dtype)
        if not self.inputs:
            return kind.channels_back(site, kind.channels_last(site, call.output) * change)
        x = call.x.to(call.output.dtype)
        scaled = kind.channels_back(site, kind.channels_last(site, x) * change)
        return kind.dense(site, scaled, site.matrix().to(scaled.dtype))
