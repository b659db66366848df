"""A model with many adapters, on either side: set-up that the benches of loading and switching share."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

import lorry
from lorry.bench._measure import llama

#: How many adapters are loaded.
COUNTS = (1, 10, 100)


class Crowd:
    """A Llama with random weights that carries adapters ``a0``, ``a1``, ..."""

    def __init__(self, layers: int, hidden: int, inner: int, rank: int) -> None:
        self.shape, self.rank = (layers, hidden, inner), rank
        self.model: nn.Module = llama(*self.shape)
        self._peer: Any = None

    def fill(self, count: int) -> None:
        """Attach adapters until there are `count`."""
        options = {"method": "lora", "rank": self.rank}
        for number in range(len(lorry.adapters(self.model)), count):
            lorry.attach(self.model, options, name=f"a{number}", activate=False).train(False)

    def peer(self, count: int) -> Any:
        """Return PEFT's model with `count` adapters of the same names; it is filled up, not built anew."""
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(r=self.rank, target_modules="all-linear")
        if self._peer is None:
            self._peer = get_peft_model(llama(*self.shape), config, adapter_name="a0")
        for number in range(len(self._peer.peft_config), count):
            self._peer.add_adapter(f"a{number}", config)
        return self._peer


def off_zero(parameters: Iterable[nn.Parameter], seed: int) -> None:
    """Give an adapter small random values, so that nothing in it is zero."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in parameters:
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.02)


def counts(most: int) -> list[int]:
    """Return the numbers of adapters up to `most`."""
    return [c for c in COUNTS if c <= most]
