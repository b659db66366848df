"""What PEFT does to the targets of a config beyond matching them: it moves some to experts, and refuses some."""

from __future__ import annotations

from torch import nn

from lorry.core.sites.kinds import kind_named
from lorry.core.sites.site import Site

#: Last names of targets that PEFT moves to banks of experts in models that once had a module for each expert: it takes
#: dense layers of these names, whole paths and regular expressions for the experts' former ones.
_EXPERTS_ONCE = frozenset(("gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3"))
#: Model types whose output projections and convolutions PEFT refuses, because a fused path reads them past the layer.
_REFUSING_TYPES = frozenset(("falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h"))
_REFUSED_THERE = frozenset(("out_proj", "conv1d"))


class PeftMoves:
    """How PEFT treats the targets in one model.

    Parameters
    ----------
    root
        The model; None if it is not known, then nothing is moved.
    """

    def __init__(self, root: nn.Module | None) -> None:
        self._type = getattr(getattr(root, "config", None), "model_type", None)
        # asked of the model's modules and not of its type, so that it holds for architectures yet to come: where PEFT
        # would have moved nothing, a weight that is targeted as a parameter is the same as its layer
        experts = kind_named("experts")
        modules = () if root is None else root.modules()
        self.banks = any(next(iter(experts.sites("", module)), None) is not None for module in modules)

    def moved(self, site: Site) -> bool:
        """Whether PEFT would take the layer for experts, so that its weight must be targeted as a parameter."""
        return self.banks and site.kind.name == "linear" and site.name in _EXPERTS_ONCE

    def refused(self, site: Site) -> str | None:
        """Return why PEFT refuses the layer, or None."""
        if self._type not in _REFUSING_TYPES or site.name not in _REFUSED_THERE:
            return None
        return f"PEFT refuses '{site.path}' in models of the type {self._type}, whose fused path reads its weight"
