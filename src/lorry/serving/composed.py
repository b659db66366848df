"""A composition of adapters for the passes inside of a context, which may lie in another one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn

from lorry.core.life.state import kept_state, state_of


@contextmanager
def composed(model: nn.Module, composition: Mapping[str, Any]) -> Iterator[None]:
    """Let adapters apply in the passes of this thread; unlike `lorry.activate`, it may lie in any other context.

    Parameters
    ----------
    model
        With the adapters on it.
    composition
        Adapters with their weights; empty for the bare base.

    Raises
    ------
    AdapterError
        An adapter that is not there.
    """
    if kept_state(model) is None and not composition:
        yield
        return
    state = state_of(model)
    scope = state.enter(state.composed(dict(composition) or None))
    try:
        yield
    finally:
        state.leave(*scope)
