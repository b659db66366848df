"""How PEFT's LoRA config says a method: what a method declares, so that nobody has to ask for its slug."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class PeftForm:
    """What an ``adapter_config.json`` of PEFT's LoRA holds for a method whose tensors are A and B (and a magnitude).

    A method that declares one has LoRA's options ``rank``, ``alpha``, ``rank_stabilized`` and ``dropout``. The
    declaration holds for the class that makes it and not for its subclasses, whose mathematics differ.

    Attributes
    ----------
    config
        Fields of the config, beside LoRA's own, that make it this method.
    start
        Beginning of ``init_lora_weights`` where the method is a start that PEFT may leave unconverted in the base
        weight; empty for a method that PEFT's format carries as it is, both ways.
    computed
        Tensors of such a start, which `Method.setup` computes from the base weight again.
    """

    config: Mapping[str, Any] = field(default_factory=dict)
    start: str = ""
    computed: tuple[str, ...] = ()

    @property
    def exact(self) -> bool:
        """Whether PEFT's folder holds the method entirely, so that it may be written there."""
        return not self.start
