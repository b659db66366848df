"""How an opened adapter gets onto a model: one entry for each way, registered by the file that knows it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lorry.core.errors import CheckpointError
from lorry.core.registry import Registry

#: Called with the opened file, the model, and the options of `lorry.load`; gives the adapter.
LOADERS: Registry[Callable[..., Any]] = Registry("way of loading", error=CheckpointError)
