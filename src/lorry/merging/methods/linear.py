"""Averages in factor space: A's and B's are combined separately, so the result has cross terms ``B_t A_u``."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from torch import Tensor

from lorry.merging.factors import Factors
from lorry.merging.inputs import SiteInput
from lorry.merging.registry import Knob, merge_method

Form = Literal["average", "square", "root"]


def combined(rows: list[tuple[Factors, float, float]], form: Form) -> Factors:
    """Return the sum of A's and of B's, with the weights of each side given by `form`.

    Parameters
    ----------
    rows
        Factors, weight and share (``|w|`` over the sum of all ``|w|``) of each adapter. Smaller ranks are padded with
        zeros.
    form
        ``average``: shares on A, weights on B; ``square``: weights on both; ``root``: ``√|w|`` on both, the sign on A.
    """
    rank = max(f.rank for f, _, _ in rows)
    sides: list[tuple[Tensor, Tensor]] = []
    for f, weight, share in rows:
        root = math.sqrt(abs(weight))
        left, right = {
            "average": (share, weight),
            "square": (weight, weight),
            "root": (math.copysign(root, weight), root),
        }[form]
        padded = f.padded(rank)
        sides.append((padded.a * left, padded.b * right))
    a, b = sides[0]
    for more_a, more_b in sides[1:]:
        a, b = a + more_a, b + more_b
    return Factors(a, b)


@merge_method(
    "linear",
    space="factor",
    source="Model Soups, arXiv 2203.05482; LoraHub's form, arXiv 2307.13269; PEFT's type linear",
    note="form=square grows with the square of the weights; form=root gives n times the adapter for n copies at "
    "weight 1/n",
)
def linear(
    site: SiteInput,
    *,
    form: Annotated[
        Form,
        Knob(
            "average: mean of the A's, weighted sum of the B's, exact where all share A; square: weights on both "
            "sides (LoraHub); "
            "root: their square roots on both sides (PEFT)."
        ),
    ] = "average",
) -> Factors:
    """Combine the A's and the B's separately (factor space)."""
    rows = [(f, w, share) for (_, f, w), share in zip(site.present(), site.shares(), strict=True)]
    if len(set(site.ranks())) > 1:
        site.facts["padded_ranks"] = site.ranks()
    whole = combined(rows, form)
    small = combined([(s, w, share) for s, (_, w, share) in zip(site.joint.parts(), rows, strict=True)], form)
    return Factors(whole.a, whole.b, (small.b, small.a))
