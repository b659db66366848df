"""Log-probabilities in the two shapes that OpenAI has for them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lorry.serving.http.prompts import Prompts
from lorry.serving.request import TokenLogprob

#: What stands for the logarithm of nothing, which JSON cannot hold.
LEAST = -9999.0


def of_completion(
    prompts: Prompts, tokens: Sequence[int], found: Sequence[TokenLogprob | None], top: int, start: int = 0
) -> dict[str, Any]:
    """Return the report of a completion.

    Parameters
    ----------
    prompts
        Decodes.
    tokens, found
        Tokens and what is known of each; nothing of a prompt's first.
    top
        Alternatives that were asked for; the chosen token is always among those that are shown.
    start
        Where in the text the first of them stands.
    """
    texts = [prompts.token_text(token) for token in tokens]
    offsets = []
    for text in texts:
        offsets.append(start)
        start += len(text)
    return {
        "tokens": texts,
        "token_logprobs": [None if one is None else _finite(one.logprob) for one in found],
        "top_logprobs": [None if one is None else _alternatives(prompts, one, top) for one in found] if top else None,
        "text_offset": offsets,
    }


def _alternatives(prompts: Prompts, one: TokenLogprob, top: int) -> dict[str, float]:
    shown: dict[str, float] = {}
    for token, value in [*one.top[:top], (one.token, one.logprob)]:
        shown.setdefault(prompts.token_text(token), _finite(value))
    return shown


def of_chat(prompts: Prompts, found: Sequence[TokenLogprob], top: int) -> dict[str, Any]:
    """Return the report of a chat's answer."""
    return {
        "content": [
            {
                **_entry(prompts, one.token, one.logprob),
                "top_logprobs": [_entry(prompts, token, value) for token, value in one.top[:top]],
            }
            for one in found
        ],
        "refusal": None,
    }


def of_prompt(prompts: Prompts, found: Sequence[TokenLogprob | None] | None) -> list[dict[str, Any] | None] | None:
    """Return the report of a prompt as vLLM gives it: for each token the likeliest and itself, by number."""
    if found is None:
        return None
    return [None if one is None else _ranked(prompts, one) for one in found]


def _ranked(prompts: Prompts, one: TokenLogprob) -> dict[str, Any]:
    shown: dict[str, Any] = {}
    for rank, (token, value) in enumerate(one.top, 1):
        shown[str(token)] = {"logprob": _finite(value), "rank": rank, "decoded_token": prompts.token_text(token)}
    own = {"logprob": _finite(one.logprob), "rank": None, "decoded_token": prompts.token_text(one.token)}
    shown.setdefault(str(one.token), own)
    return shown


def _entry(prompts: Prompts, token: int, value: float) -> dict[str, Any]:
    return {"token": prompts.token_text(token), "logprob": _finite(value), "bytes": prompts.token_bytes(token)}


def _finite(value: float) -> float:
    return max(value, LEAST) if value == value else LEAST
