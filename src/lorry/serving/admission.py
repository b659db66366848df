"""How many pages running requests are going to need at most, so that what is admitted never has to be thrown out.

After the admission of S-LoRA (arXiv 2311.03285, its code): requests leave one after another, and just before one
leaves, it and those that stay longer hold the most. There a page is one token and a prompt is computed at once; here
pages hold several tokens, and a long prompt may take several passes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Need:
    """What one request needs of the pool until it ends.

    Attributes
    ----------
    stored
        Tokens that lie in pages after its next pass, if its prompt is computed by then.
    growth
        Passes after that one, at most; each stores one token more.
    missing
        Tokens of the prompt that are still to be computed; 0 or 1 for one that decodes.
    """

    stored: int
    growth: int
    missing: int = 1


def peak_pages(needs: Sequence[Need], page_tokens: int, chunk: int) -> int:
    """Return the most pages that requests hold at any time if all of them run to their ends.

    It is exact where every prompt is computed in one pass, and never too little otherwise: a request whose prompt takes
    longer may begin to grow at once or that much later.

    Parameters
    ----------
    needs
        Of all requests, in the order in which their prompts are computed.
    page_tokens
        Tokens of a page.
    chunk
        Tokens of prompts that a pass computes at least, if there are so many.
    """
    ends, missing = [], 0
    for need in needs:
        if need.missing > 1:
            missing += need.missing
            ends.append(need.growth + -(-missing // chunk) - 1)
        else:
            ends.append(need.growth)
    most = 0
    for end in set(ends):
        alive = (need for need, last in zip(needs, ends, strict=True) if last >= end)
        most = max(most, sum(-(-(need.stored + min(need.growth, end)) // page_tokens) for need in alive))
    return most
