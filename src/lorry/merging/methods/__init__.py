"""Merge methods, one file each; variants that differ by a parameter are rows of a table in one file."""

from __future__ import annotations

from lorry.merging.registry import MERGES

MERGES.source(__name__, __path__)
