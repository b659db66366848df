"""A batch of logits to a token for each row: the processors of transformers and OpenAI's penalties, all rows at once.

In this order, each on the rows that ask for it: repetition penalty, presence and frequency penalties, bias, grammar, no
end before `min_tokens`; then the likeliest for greedy rows, for the others temperature, top-k, top-p, min-p and a draw.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lorry.serving.request import TokenLogprob

from .chooser import Chooser
from .draw import draw

#: The error of a request whose grammar is to blame, and not the server.
DEAD_END = (
    "The grammar leads to a text that the tokens of this model cannot spell. Change the grammar, such as characters "
    "that its tokenizer does not know."
)


@torch.no_grad()
def choose(logits: Tensor, choosers: Sequence[Chooser]) -> list[TokenLogprob]:
    """Choose the next token of each row, and let its chooser remember it.

    Parameters
    ----------
    logits
        (n, vocabulary), floating, not changed.
    choosers
        One for each row, of requests that are not finished.

    Returns
    -------
    list
        For each row its token. The log-probability is that of the logits as they were given, and is not a number
        (``math.nan``) in rows that did not ask for it. A row that cannot go on, as its chooser's `error` says, has
        the token -1, which is not part of the answer.
    """
    if not choosers:
        return []
    scores = _processed(logits, choosers)
    sampled = [row for row, chooser in enumerate(choosers) if not chooser.greedy]
    if len(sampled) == len(choosers):
        tokens = draw(scores.float(), choosers).tolist()
    else:
        chosen = scores.argmax(-1)
        if sampled:
            rows = _long(sampled, logits)
            chosen[rows] = draw(scores[rows].float(), [choosers[row] for row in sampled])
        tokens = chosen.tolist()
    failed = {row for row, chooser in enumerate(choosers) if chooser.finish == "error"}
    for row, chooser in enumerate(choosers):
        if row not in failed:
            chooser.take(tokens[row])
    asked = [None if row in failed else chooser.sampling.logprobs for row, chooser in enumerate(choosers)]
    return _reports(logits, [-1 if row in failed else token for row, token in enumerate(tokens)], asked)


@torch.no_grad()
def report(logits: Tensor, tokens: Sequence[int], top: int) -> list[TokenLogprob]:
    """Return the log-probabilities of given tokens, such as those of a prompt.

    Parameters
    ----------
    logits
        (n, vocabulary).
    tokens
        One for each row: what came next.
    top
        How many of the likeliest alternatives to name for each.
    """
    values = logits.float()
    norm = values.logsumexp(-1, keepdim=True)
    own = (values.gather(-1, _long(tokens, values)[:, None]) - norm)[:, 0].tolist()
    if not top:
        return [TokenLogprob(token, value) for token, value in zip(tokens, own, strict=True)]
    best, ids = values.topk(min(top, values.shape[-1]), dim=-1)
    pairs = zip(ids.tolist(), (best - norm).tolist(), strict=True)
    named = [tuple(zip(i, v, strict=True)) for i, v in pairs]
    return [TokenLogprob(*each) for each in zip(tokens, own, named, strict=True)]


def _reports(logits: Tensor, tokens: list[int], asked: list[int | None]) -> list[TokenLogprob]:
    found = [TokenLogprob(token, float("nan")) for token in tokens]
    # by number of alternatives, so that ties among them do not depend on what other rows ask for
    for top in {number for number in asked if number is not None}:
        rows = [row for row, number in enumerate(asked) if number == top]
        chosen = report(logits[_long(rows, logits)], [tokens[row] for row in rows], top)
        for row, each in zip(rows, chosen, strict=True):
            found[row] = each
    return found


def _processed(logits: Tensor, choosers: Sequence[Chooser]) -> Tensor:
    """Return the logits after everything that is not a matter of drawing; the same tensor where nothing applies."""
    rows = [row for row, chooser in enumerate(choosers) if not chooser.plain]
    banned = {row: chooser.banned for row, chooser in enumerate(choosers) if chooser.banned}
    if not (rows or banned):
        return logits
    scores = logits.float().clone()
    special = [(row, choosers[row]) for row in rows]
    _penalise(scores, [(row, c) for row, c in special if c.repeating or c.counting])
    biased = [(row, c) for row, c in special if c.sampling.bias]
    if biased:
        at = _places([(row, c.bias[0]) for row, c in biased], scores)
        scores[at] += torch.cat([c.bias[1] for _, c in biased]).to(scores.device)
    _constrain(scores, [(row, c) for row, c in special if c.matcher is not None])
    if banned:
        at = _places([(row, torch.tensor(sorted(tokens))) for row, tokens in banned.items()], scores)
        before = scores[at]
        scores[at] = -torch.inf
        # a grammar that is at its end allows nothing else
        left = scores.amax(-1)[at[0]] > -torch.inf
        scores[at] = torch.where(left, -torch.inf, before)
    return scores


def _penalise(scores: Tensor, rows: list[tuple[int, Chooser]]) -> None:
    repeating = [(row, c) for row, c in rows if c.repeating]
    if repeating:
        at = _places([(row, c.seen.tokens) for row, c in repeating], scores)
        penalty = _spread(repeating, lambda c: c.sampling.repetition_penalty, lambda c: c.seen.number, scores)
        values = scores[at]
        scores[at] = torch.where(values > 0, values / penalty, values * penalty)
    counting = [(row, c) for row, c in rows if c.counting]
    if counting:
        at = _places([(row, c.answered.tokens) for row, c in counting], scores)
        counts = torch.cat([c.answered.counts for _, c in counting]).to(scores.device)
        once = _spread(counting, lambda c: c.sampling.presence_penalty, lambda c: c.answered.number, scores)
        each = _spread(counting, lambda c: c.sampling.frequency_penalty, lambda c: c.answered.number, scores)
        scores[at] -= once + each * counts


def _constrain(scores: Tensor, rows: list[tuple[int, Chooser]]) -> None:
    """Take out what the grammars of these rows do not allow next."""
    if not rows:
        return
    import xgrammar  # present: it made the matchers

    mask = xgrammar.allocate_token_bitmask(len(rows), scores.shape[-1])
    for place, (_, chooser) in enumerate(rows):
        chooser.matcher.fill_next_token_bitmask(mask, place)
    words = torch.arange(scores.shape[-1])
    allowed = ((mask[:, words // 32] >> (words % 32)) & 1).bool()
    allowed[:, rows[0][1].wordless] = False
    for place in (~allowed.any(-1)).nonzero()[:, 0].tolist():
        rows[place][1].fail(DEAD_END)
        allowed[place] = True  # the row is not used
    at = _long([row for row, _ in rows], scores)
    scores[at] = scores[at].masked_fill(~allowed.to(scores.device), -torch.inf)


def _places(parts: Sequence[tuple[int, Tensor]], like: Tensor) -> tuple[Tensor, Tensor]:
    """Return rows and columns of the tokens of each part; no place comes twice."""
    lengths = torch.tensor([len(tokens) for _, tokens in parts])
    rows = torch.tensor([row for row, _ in parts]).repeat_interleave(lengths)
    return rows.to(like.device), torch.cat([tokens for _, tokens in parts]).to(like.device)


def _spread(
    rows: Sequence[tuple[int, Chooser]],
    value: Callable[[Chooser], float],
    number: Callable[[Chooser], int],
    like: Tensor,
) -> Tensor:
    """Return each row's value as often as it has tokens."""
    values = torch.tensor([value(c) for _, c in rows], dtype=torch.float32)
    return values.repeat_interleave(torch.tensor([number(c) for _, c in rows])).to(like.device)


def _long(values: Sequence[int], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=torch.long, device=like.device)
