"""LoRA-FA: LoRA whose down-projection stays at its random start."""

from __future__ import annotations

from dataclasses import dataclass, replace

from lorry.core.method.registry import preset, register
from lorry.core.method.spec import TensorSpec
from lorry.core.sites.site import Site
from lorry.methods.lora import LoRA


@register("lora-fa", paper="arXiv 2308.03303")
@dataclass(frozen=True)
class LoRAFA(LoRA):
    """``ΔW = scale · B A`` with A frozen: the update lies in a fixed random row space, and only ``rank ·
    out`` values are trained.

    Of an activation only ``A x`` ``(tokens, rank)`` is needed for the gradient (section 3). A is written to
    the checkpoint, so that it loads as a plain LoRA everywhere.

    Use it where the memory of activations is the limit: of the input only the product with A is kept.
    """

    def tensors(self, site: Site) -> dict[str, TensorSpec]:
        """Return A, frozen, and B."""
        own = super().tensors(site)
        return {**own, "A": replace(own["A"], trained=False)}


# the same formula; the reason differs: averages of clients are exact, and noise is added to one factor only
preset("ffa-lora", of="lora-fa", paper="arXiv 2403.12313")
