"""DEYOLO (arXiv 2412.04931): detection in aligned pairs of RGB and infrared pictures, fused as features."""

from __future__ import annotations

from .fit import Plan, fit
from .focus import BiFocus
from .fusion import DEA, DECA, DEPA
from .measure import draw, found, precision
from .model import FUSIONS, WIDTHS, Options, adapted, detector, load, save
from .pairs import Pairs, read, without, write
from .toy import toy

__all__ = [
    "DEA",
    "DECA",
    "DEPA",
    "FUSIONS",
    "WIDTHS",
    "BiFocus",
    "Options",
    "Pairs",
    "Plan",
    "adapted",
    "detector",
    "draw",
    "fit",
    "found",
    "load",
    "precision",
    "read",
    "save",
    "toy",
    "without",
    "write",
]
