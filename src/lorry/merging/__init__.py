"""Merging: an algebra of adapters. Adapters of one base go in, one ordinary adapter and a receipt come out; no model
is needed.
"""

from __future__ import annotations

import lorry.merging.methods  # noqa: F401  they register at the first look-up
from lorry.merging.compare import Comparison, compare, comparison_picture, comparison_table
from lorry.merging.engine import merge
from lorry.merging.factors import Factors
from lorry.merging.inputs import Pool, SiteInput
from lorry.merging.mixture import Mixture, from_adapters, mix
from lorry.merging.output import MergedAdapter
from lorry.merging.receipt import MergeReceipt
from lorry.merging.recipe import Recipe, merge_recipe, read_recipe
from lorry.merging.registry import Knob, merge_method, merge_method_named, merge_methods
from lorry.merging.weights import Step

__all__ = [
    "Comparison",
    "Factors",
    "Knob",
    "MergeReceipt",
    "MergedAdapter",
    "Mixture",
    "Pool",
    "Recipe",
    "SiteInput",
    "Step",
    "compare",
    "comparison_picture",
    "comparison_table",
    "from_adapters",
    "merge",
    "merge_method",
    "merge_method_named",
    "merge_methods",
    "merge_recipe",
    "mix",
    "read_recipe",
]
