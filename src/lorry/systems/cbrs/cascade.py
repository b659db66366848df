"""The filter of two layers: a cheap classifier for every message, a language model for what it lets through.

Source: arXiv 2604.16665. The first layer is TF-IDF with logistic regression, weighted so that it lets through little
that is no request; the second is asked about the rest alone, so that calls are as many as the first layer's positives.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

from lorry.core.errors import OptionError

#: Words and pairs of words that are counted, inverse regularisation, weights of the classes in the cascade.
FEATURES, C, NEGATIVE_WEIGHT = 5000, 1.0, 15.0


class FirstLayer:
    """TF-IDF of words and pairs of words, and logistic regression, by scikit-learn.

    Parameters
    ----------
    messages
        To learn from.
    requests
        Whether each is one.
    negative_weight
        Of those that are not, against 1; the larger, the fewer messages pass.

    Raises
    ------
    OptionError
        Messages and labels differ in number, or one class is missing.
    """

    def __init__(
        self, messages: Sequence[str], requests: Sequence[bool], negative_weight: float = NEGATIVE_WEIGHT
    ) -> None:
        from sklearn.feature_extraction.text import TfidfVectorizer
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline

        if len(messages) != len(requests) or len(set(requests)) != 2:
            raise OptionError(
                f"Expected messages of both classes, each with a label, found {len(messages)} messages and "
                f"{sum(requests)} requests among {len(requests)} labels."
            )
        self._model: Any = make_pipeline(
            TfidfVectorizer(max_features=FEATURES, ngram_range=(1, 2)),
            LogisticRegression(C=C, class_weight={False: negative_weight, True: 1.0}, max_iter=1000),
        )
        self._model.fit(list(messages), [bool(each) for each in requests])

    def __call__(self, messages: Sequence[str]) -> list[bool]:
        """Return whether each message passes."""
        return [bool(each) for each in self._model.predict(list(messages))] if len(messages) else []


class Cascade:
    """Both layers.

    Parameters
    ----------
    first
        The cheap classifier.
    ask
        A language model's answer to a message: JSON with ``is_blood_donation_request``. An answer that cannot be read,
        or an error, keeps the message: what the first layer is sure of is not lost to a failure.

    Attributes
    ----------
    calls
        How often the language model was asked.
    unread
        How many of its answers could not be read.
    """

    def __init__(self, first: Callable[[Sequence[str]], Sequence[bool]], ask: Callable[[str], str]) -> None:
        self._first, self._ask = first, ask
        self.calls = self.unread = 0

    def __call__(self, messages: Sequence[str]) -> list[bool]:
        """Return whether each message is a request."""
        return [passes and self._kept(each) for each, passes in zip(messages, self._first(messages), strict=True)]

    def _kept(self, message: str) -> bool:
        self.calls += 1
        try:
            said = read_answer(self._ask(message))
        except Exception:  # whatever a model's server can raise
            said = None
        self.unread += said is None
        return said is not False


def read_answer(text: str) -> bool | None:
    """Return yes or no from a model's JSON, None if it is neither."""
    try:
        value = json.loads(text)
    except (TypeError, ValueError):
        return None
    word = str(value.get("is_blood_donation_request", "") if isinstance(value, dict) else value).strip().lower()
    return {"true": True, "yes": True, "false": False, "no": False}.get(word)
