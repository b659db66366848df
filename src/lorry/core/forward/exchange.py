"""Attributes of modules exchanged for a while: other weights, another forward."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import nn


@contextmanager
def exchanged(pairs: Sequence[tuple[nn.Module, str, object]]) -> Iterator[None]:
    """Let modules have other values under names, of parameters too, without touching what they own."""
    hidden = [(m.__dict__, n, m.__dict__.get(n)) for m, n, _ in pairs]
    for module, name, value in pairs:
        module.__dict__[name] = value
    try:
        yield
    finally:
        for attributes, name, value in reversed(hidden):
            if value is None:
                attributes.pop(name, None)
            else:
                attributes[name] = value
