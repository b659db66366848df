"""Draws from rows of scores, each from its own filters and its own random numbers.

A draw is a race: with g(token) from Gumbel's distribution, the token of the largest score + g has the probability of
softmax(score). Every g is a function of the request's seed, the position and the token alone, so a row's draw does not
depend on what else is in the batch; and scores that differ in their last bits, as those of differently sized batches
do, change it only where two tokens all but tie.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .chooser import Chooser

#: Entries of (rows, vocabulary) that are drawn from at a time: what bounds the memory of it.
AT_ONCE = 1 << 23
#: Of how many of the likeliest tokens a nucleus (top-p) is sought first.
HEAD = 512
_COLDEST = 1e-30


def draw(scores: Tensor, choosers: Sequence[Chooser]) -> Tensor:
    """Return a token for each row.

    Parameters
    ----------
    scores
        (n, vocabulary) float32 logits; ``-inf`` is never drawn.
    choosers
        One for each row, with a temperature above 0.

    Returns
    -------
    Tensor
        (n,) int64.
    """
    kinds = [(c.sampling.top_k > 0, c.sampling.top_p < 1) for c in choosers]
    rows_at_once = max(1, AT_ONCE // scores.shape[-1])
    chosen = torch.empty(len(choosers), dtype=torch.long, device=scores.device)
    for kind in set(kinds):
        rows = [row for row, each in enumerate(kinds) if each == kind]
        for start in range(0, len(rows), rows_at_once):
            part = rows[start : start + rows_at_once]
            at = torch.tensor(part, device=scores.device)
            chosen[at] = _drawn(scores[at], [choosers[row] for row in part], *kind)
    return chosen


def _drawn(scores: Tensor, choosers: Sequence[Chooser], any_k: bool, any_p: bool) -> Tensor:
    """Return a token for each row; all rows have a top-k or none has, and so with top-p."""

    def column(values: list[float], dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=scores.device)[:, None]

    options = [c.sampling for c in choosers]
    scores = scores - scores.amax(-1, keepdim=True)
    scores = scores / column([s.temperature for s in options]).clamp(min=_COLDEST)
    tokens = torch.arange(scores.shape[-1], device=scores.device).expand_as(scores)
    if any_k:
        scores, tokens = _likeliest(scores, [s.top_k for s in options])
    if any_p:
        norm = scores.double().logsumexp(-1, keepdim=True)
        most = column([s.top_p for s in options], torch.float64)
        if scores.shape[-1] > HEAD:
            head, ids = _likeliest(scores, [HEAD] * len(options))
            if bool(((head.double() - norm).exp().sum(-1, keepdim=True) > most + 1e-9).all()):
                scores, tokens = head, ids  # they hold the whole nucleus, and need not be sorted with all others
        scores, order = scores.sort(dim=-1, descending=True, stable=True)
        tokens = tokens.gather(-1, order)
        shares = (scores.double() - norm).exp()
        before = shares.cumsum(-1) - shares
        outside = before >= most
        outside[:, 0] = False
        scores = scores.masked_fill(outside, -torch.inf)
    if any(s.min_p for s in options):
        # the largest score is 0, so its part of the probability is exp(score)
        scores = scores.masked_fill(scores < column([s.min_p for s in options]).log(), -torch.inf)
    keys = torch.tensor([c.key for c in choosers], device=scores.device)
    race = scores + gumbel(keys[:, None], tokens)
    return tokens.gather(-1, race.argmax(-1, keepdim=True))[:, 0]


def _likeliest(scores: Tensor, numbers: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Return scores and tokens of each row's likeliest, padded with ``-inf``; what ties with the last is among them."""
    width = scores.shape[-1]
    most = min(max(numbers), width)
    lasts = torch.tensor([min(number, width) - 1 for number in numbers], device=scores.device)
    bounds = scores.topk(most, dim=-1).values.gather(-1, lasts[:, None])
    rows, tokens = ((scores >= bounds) & (scores > -torch.inf)).nonzero(as_tuple=True)
    counts = torch.bincount(rows, minlength=len(scores))
    places = torch.arange(len(rows), device=scores.device) - (counts.cumsum(0) - counts)[rows]
    shape = (len(scores), int(counts.max()))
    kept = scores.new_full(shape, -torch.inf)
    kept[rows, places] = scores[rows, tokens]
    ids = tokens.new_zeros(shape)
    ids[rows, places] = tokens
    return kept, ids


def gumbel(keys: Tensor, tokens: Tensor) -> Tensor:
    """Return numbers of Gumbel's distribution, each a function of its key and its token alone.

    Parameters
    ----------
    keys
        int64, any; `Chooser.key`.
    tokens
        int64, broadcast against `keys`.

    Returns
    -------
    Tensor
        float64. The bits come from the finaliser of MurmurHash3 for 64 bits.
    """
    x = keys ^ (tokens * -0x61C8864680B583EB)
    x = (x ^ _shifted(x, 33)) * -0x00AE502812AA7333
    x = (x ^ _shifted(x, 33)) * -0x3B314601E57A13AD
    x = x ^ _shifted(x, 33)
    uniform = (_shifted(x, 11).double() + 0.5) * 2.0**-53
    return -torch.log(-torch.log(uniform))


def _shifted(x: Tensor, by: int) -> Tensor:
    """Return x shifted to the right with zeros coming in."""
    return (x >> by) & ((1 << (64 - by)) - 1)
