"""Parametrisations, one file each. A file registers its method; nothing else names it."""

from __future__ import annotations

from lorry.core.method.registry import METHODS

METHODS.source(__name__, __path__)
