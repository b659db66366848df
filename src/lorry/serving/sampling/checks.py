"""The one place at which options of sampling are checked."""

from __future__ import annotations

import math
from collections.abc import Iterable

from lorry.core.errors import OptionError, some
from lorry.serving.request import Sampling

from .vocabulary import Vocabulary

#: Most alternatives that are reported for a token.
MOST_LOGPROBS = 64
_WHOLE = {"max_tokens": 1, "top_k": 0, "min_tokens": 0, "logprobs": 0, "prompt_logprobs": 0}
_REAL = (
    "temperature",
    "top_p",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
)


def check_sampling(sampling: Sampling, vocabulary: Vocabulary) -> None:
    """Refuse options that mean nothing, and a grammar that cannot be kept to (it is compiled here, and kept).

    Raises
    ------
    OptionError
        Names the option, what it must be and what it is.
    ImportError
        There is a grammar and xgrammar is not installed.
    """
    for name, least in _WHOLE.items():
        value = getattr(sampling, name)
        if value is None and name.endswith("logprobs"):
            continue
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise OptionError(f"The option '{name}' must be a whole number of at least {least}, found {value!r}.")
    for name in _REAL:
        value = getattr(sampling, name)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise OptionError(f"The option '{name}' must be a finite number, found {value!r}.")
    _check_ranges(sampling)
    _check_tokens("bias", sampling.bias, vocabulary)
    _check_tokens("stop_tokens", sampling.stop_tokens, vocabulary)
    for token, added in sampling.bias.items():
        if isinstance(added, bool) or not isinstance(added, int | float) or not math.isfinite(added):
            raise OptionError(f"The bias of token {token} must be a finite number, found {added!r}.")
    if any(not isinstance(text, str) or not text for text in sampling.stop):
        raise OptionError(f"Every stop text must be a text that is not empty, found {list(sampling.stop)!r}.")
    if sampling.seed is not None and (isinstance(sampling.seed, bool) or not isinstance(sampling.seed, int)):
        raise OptionError(f"The option 'seed' must be a whole number, found {sampling.seed!r}.")
    if sampling.grammar is not None:
        vocabulary.matcher(sampling.grammar)


def _check_ranges(sampling: Sampling) -> None:
    if sampling.temperature < 0:
        raise OptionError(
            f"The option 'temperature' must not be negative, found {sampling.temperature}. Zero is greedy."
        )
    if not 0 < sampling.top_p <= 1:
        raise OptionError(f"The option 'top_p' must be above 0 and at most 1, found {sampling.top_p}. One keeps all.")
    if not 0 <= sampling.min_p <= 1:
        raise OptionError(f"The option 'min_p' must be from 0 to 1, found {sampling.min_p}. Zero keeps all.")
    if sampling.repetition_penalty <= 0:
        raise OptionError(
            f"The option 'repetition_penalty' must be above 0, found {sampling.repetition_penalty}. One is none."
        )
    if sampling.min_tokens > sampling.max_tokens:
        raise OptionError(
            f"The option 'min_tokens' must be at most 'max_tokens', found {sampling.min_tokens} and "
            f"{sampling.max_tokens}."
        )
    for name in ("logprobs", "prompt_logprobs"):
        if (getattr(sampling, name) or 0) > MOST_LOGPROBS:
            raise OptionError(
                f"The option '{name}' must be at most {MOST_LOGPROBS}, found {getattr(sampling, name)}. Ask for fewer."
            )


def _check_tokens(option: str, tokens: Iterable[int], vocabulary: Vocabulary) -> None:
    unknown = [t for t in tokens if isinstance(t, bool) or not isinstance(t, int) or not 0 <= t < vocabulary.size]
    if unknown:
        raise OptionError(
            f"The option '{option}' names {some(map(str, unknown))}, which the model does not know. Its tokens are 0 "
            f"to {vocabulary.size - 1}."
        )
