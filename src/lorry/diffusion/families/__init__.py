"""Families of pipelines, one file each, found by the class of a pipeline; a new one is a file that registers itself."""

from __future__ import annotations

from lorry.diffusion.families.base import FAMILIES, Family, family_of

__all__ = ["FAMILIES", "Family", "family_of"]

FAMILIES.source(__name__, __path__)
