"""Formats in which an adapter can be written; each registers itself from above the core."""

from __future__ import annotations

from collections.abc import Callable

from lorry.core.errors import CheckpointError
from lorry.core.receipt import Receipt
from lorry.core.registry import Registry

#: Called with the adapter, the path, and options of their own.
WRITERS: Registry[Callable[..., Receipt]] = Registry("format to write", error=CheckpointError)
