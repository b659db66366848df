"""The heads that a base may have, and which of them an objective needs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lorry.core.life.state import unwrapped

from .data_errors import DataError


@dataclass(frozen=True)
class Head:
    """A head of transformers' models.

    Attributes
    ----------
    auto
        The class of transformers that loads bases with it.
    endings
        How the names of such models' classes end.
    needs, has
        What an objective needs that wants it, and what a model has that brings it.
    """

    auto: str
    endings: tuple[str, ...]
    needs: str
    has: str

    def on(self, model: Any) -> bool:
        """Return whether a model has this head, as far as the name of its class tells."""
        return type(unwrapped(model)).__name__.endswith(self.endings)


#: By the name that ``task`` has in a run's YAML.
HEADS: dict[str, Head] = {
    "causal-lm": Head("AutoModelForCausalLM", ("ForCausalLM", "LMHeadModel"), "predicts tokens", "predicts tokens"),
    "sequence-classification": Head(
        "AutoModelForSequenceClassification",
        ("ForSequenceClassification",),
        "needs a classification head",
        "has a classification head",
    ),
    "token-classification": Head(
        "AutoModelForTokenClassification",
        ("ForTokenClassification",),
        "needs a head with classes for each token",
        "has classes for each token",
    ),
    "masked-lm": Head(
        "AutoModelForMaskedLM", ("ForMaskedLM",), "needs a head that fills in masked tokens", "fills in masked tokens"
    ),
    "seq2seq-lm": Head(
        "AutoModelForSeq2SeqLM",
        ("ForConditionalGeneration",),
        "needs an encoder and a decoder",
        "has an encoder and a decoder",
    ),
    "features": Head("AutoModel", (), "needs a model without a head", "has no head"),
    "image-classification": Head(
        "AutoModelForImageClassification",
        ("ForImageClassification",),
        "needs a head with classes of pictures",
        "has classes of pictures",
    ),
}


def check_head(wanted: str | None, model: Any, objective: str) -> None:
    """Refuse a model whose class says that it has another head than the objective needs.

    Raises
    ------
    DataError
        What is needed, what the model has, and how to load it.
    """
    if wanted is None or HEADS[wanted].on(model):
        return
    found = next((head for head in HEADS.values() if head.endings and head.on(model)), None)
    if found is not None:
        kind, head = type(unwrapped(model)).__name__, HEADS[wanted]
        raise DataError(
            f"Objective '{objective}' {head.needs}, but {kind} {found.has}; load the base with {head.auto}."
        )


def own_outputs(model: Any, count: int, what: str = "classes") -> int | None:
    """Return how many of the head's outputs are a job's own: `count` where the head has more, None where as many.

    Raises
    ------
    DataError
        The head has fewer.
    """
    head = getattr(getattr(model, "config", None), "num_labels", None)
    if head is not None and count > head:
        raise DataError(
            f"The job has {count} {what}, but the model's head has {head}; load the base with num_labels={count}."
        )
    return count if head is not None and count < head else None
