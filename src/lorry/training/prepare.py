"""From a job to rows that its base can take: read, encoded, held out, checked."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .data import load_records
from .data_errors import DataError
from .jobs import Job
from .objectives import Classification, Objective
from .rows import EncodedSet


@dataclass(frozen=True)
class Prepared:
    """A job's rows.

    Attributes:
        objective: as the job asks for it.
        train, evaluation: rows to learn from, and held-out ones if there are any.
        labels: names of the classes in the order of the head, for classification.
        classes: how many of the head's logits are the job's own; None for all.
    """

    objective: Objective
    train: EncodedSet
    evaluation: EncodedSet | None
    labels: tuple[str, ...] | None = None
    classes: int | None = None

    def fingerprint(self) -> str:
        """A hash of the training rows: a run may go on only with the data it began with."""
        digest = hashlib.blake2b(digest_size=8)
        for row in self.train.rows:
            digest.update(row.input_ids.numpy().tobytes())
            digest.update(b"|" if row.labels is None else row.labels.numpy().tobytes())
            digest.update(str(row.label).encode())
        return digest.hexdigest()


def prepare(job: Job, tokenizer: Any, model: nn.Module) -> Prepared:
    """Read and encode a job's data, and check it against the model.

    Raises:
        DataError: data that cannot be read, encoded, or used with this model.
    """
    objective = job.make_objective()
    _check_task(objective, model)
    labels = job.labels
    train, labels = _encode(job.data, objective, tokenizer, labels)
    evaluation = None
    if job.eval_data is not None:
        evaluation, _ = _encode(job.eval_data, objective, tokenizer, labels)
    elif job.hold_out:
        # one long text is held out from its end; examples are drawn, since files are often sorted by class
        seed = None if objective.name == "causal" else job.seed
        train, evaluation = train.hold_out(job.hold_out, seed)
    classes = None
    if objective.task == "sequence-classification":
        classes = _check_head(train, labels, model)
    for name, rows in (("data", train), ("eval_data", evaluation)):
        if rows is not None:
            _check_rows(rows, name, model)
    return Prepared(objective, train, evaluation, labels, classes)


def _encode(
    data: Any, objective: Objective, tokenizer: Any, labels: tuple[str, ...] | None
) -> tuple[EncodedSet, tuple[str, ...] | None]:
    if isinstance(data, EncodedSet):
        return data, labels
    if tokenizer is None:
        raise DataError("text needs a tokenizer; give one, or give rows that are encoded already (EncodedSet)")
    records = load_records(data)
    if isinstance(objective, Classification) and labels is None:
        labels = objective.label_names(records)
    return objective.encode(tokenizer, records, labels=labels), labels


def _check_task(objective: Objective, model: nn.Module) -> None:
    """Tell a model with a classification head from one that predicts tokens by the name of its class."""
    kind = type(model).__name__
    if objective.task == "causal-lm" and kind.endswith("ForSequenceClassification"):
        raise DataError(
            f"objective '{objective.name}' predicts tokens, but {kind} has a classification head; load the "
            "base with AutoModelForCausalLM"
        )
    if objective.task == "sequence-classification":
        if kind.endswith(("ForCausalLM", "LMHeadModel")):
            raise DataError(
                f"objective '{objective.name}' needs a classification head, but {kind} predicts tokens; load "
                "the base with AutoModelForSequenceClassification"
            )


def _check_head(train: EncodedSet, labels: tuple[str, ...] | None, model: nn.Module) -> int | None:
    config: Any = getattr(model, "config", None)
    head = getattr(config, "num_labels", None)
    classes = len(labels) if labels else max(row.label or 0 for row in train.rows) + 1
    if head is not None and classes > head:
        raise DataError(
            f"the job has {classes} classes, but the model's head has {head}; load the base with num_labels={classes}"
        )
    return classes if head is not None and classes < head else None


def _check_rows(rows: EncodedSet, name: str, model: nn.Module) -> None:
    ids = torch.cat([row.input_ids for row in rows.rows])
    low, high = int(ids.min()), int(ids.max())
    getter = getattr(model, "get_input_embeddings", None)
    table: Any = getter() if callable(getter) else None
    size = getattr(table, "num_embeddings", None)
    if size is not None and not 0 <= low <= high < size:
        bad = high if high >= size else low
        raise DataError(
            f"{name} has the token {bad}, but the model knows {size} tokens: the tokenizer does not belong "
            "to this model"
        )
    config: Any = getattr(model, "config", None)
    most = getattr(config, "max_position_embeddings", None)
    longest = max(rows.lengths)
    if most is not None and longest > most:
        raise DataError(
            f"{name} has rows of {longest} tokens, but the model takes {most}; set max_length to {most} or less"
        )
