"""Another attention for a model of transformers, for the length of one pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn


def register(name: str, attend: Callable[..., Any], mask: Callable[..., Any]) -> None:
    """Let transformers know an attention, and what makes the masks for it."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(name, attend)
    AttentionMaskInterface.register(name, mask)


def configs_of(model: nn.Module) -> list[Any]:
    """Return the configs that a model's parts read, each once."""
    return list({id(c): c for c in (getattr(m, "config", None) for m in model.modules()) if c}.values())


@contextmanager
def attending(configs: Sequence[Any], name: str) -> Iterator[None]:
    """Let the parts of a model that read these configs attend by what was registered under a name."""
    before = [config._attn_implementation_internal for config in configs]
    for config in configs:
        config._attn_implementation_internal = name
    try:
        yield
    finally:
        for config, usual in zip(configs, before, strict=True):
            config._attn_implementation_internal = usual
