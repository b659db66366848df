"""Comparisons side by side with the floor and with PEFT, one file each. A file registers its bench; nothing else
names it.
"""

from __future__ import annotations

from lorry.bench._registry import BENCHES

BENCHES.source(__name__, __path__)

__all__ = ["BENCHES"]
