"""Losses and evaluation sums on one job's rows of a joint batch.

Each loss returns a sum and a count, never a mean: a job that accumulates over several micro-batches divides
by its own number of predictions, so that its step is that of one large batch, whatever the other jobs do.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .rows import IGNORE

# Elements of logits that are in float32 at one time: 16 MiB.
_CHUNK = 1 << 22


def count_labels(labels: Tensor) -> int:
    """Predictions in a batch: labelled tokens of (n, L) labels after the first position, or classes of
    (n,).
    """
    scored = labels[:, 1:] if labels.dim() == 2 else labels
    return int((scored != IGNORE).sum())


def causal_loss(logits: Tensor, labels: Tensor) -> tuple[Tensor, int]:
    """Cross-entropy of next-token prediction, summed over the labelled tokens.

    ``logits[:, t]`` predicts ``labels[:, t + 1]``. Large logits are taken to float32 a chunk at a time, in
    forward and in backward, and only where there are labels if those are few; no copy of them all is made or
    kept.

    Parameters
    ----------
    logits
        (n, L, V), any float dtype.
    labels
        (n, L), -100 where nothing is predicted.

    Returns
    -------
    tuple[Tensor, int]
        The sum as a float32 scalar (float64 of few logits in float64) with gradient (0 with zero gradients if nothing
        is labelled), and the number of predictions.

    Raises
    ------
    ValueError
        Shapes that do not fit, or a label outside the vocabulary.
    """
    targets = next_tokens(logits, labels)
    flat = logits.reshape(-1, logits.shape[-1])
    index = (targets != IGNORE).nonzero()[:, 0]
    count = len(index)
    chosen = targets[index]
    _check_targets(chosen, logits.shape[-1], "vocabulary size", "the tokenizer does not belong to this model")
    if flat.numel() <= _CHUNK // 4:  # small enough that torch's own, which keeps a copy, is the cheaper
        exact = flat if flat.dtype == torch.float64 else flat.float()
        return F.cross_entropy(exact, targets, ignore_index=IGNORE, reduction="sum"), count
    few = 2 * count < len(targets)
    arguments = (flat, chosen, index) if few else (flat, targets, None)
    total: Tensor = _ChunkedCrossEntropy.apply(*arguments)  # type: ignore[no-untyped-call]
    return total, count


def next_tokens(logits: Tensor, labels: Tensor) -> Tensor:
    """For each position of (n, L, V) logits the label that it is to predict, -100 where there is none; (n *
    L,).

    Raises
    ------
    ValueError
        Labels that are not (n, L).
    """
    if logits.dim() != 3 or labels.shape != logits.shape[:2]:
        raise ValueError(
            f"Expected logits (n, L, V) and labels (n, L), found {tuple(logits.shape)} and {tuple(labels.shape)}."
        )
    return F.pad(labels[:, 1:], (0, 1), value=IGNORE).reshape(-1)


def _check_targets(targets: Tensor, size: int, what: str, hint: str) -> None:
    if targets.numel():
        low, high = (int(end) for end in torch.aminmax(targets))
        if low < 0 or high >= size:
            raise ValueError(f"label {high if high >= size else low}, but the model's {what} is {size}: {hint}")


def _chunks(count: int, width: int) -> Iterator[slice]:
    step = max(1, _CHUNK // max(width, 1))
    for begin in range(0, count, step):
        yield slice(begin, min(begin + step, count))


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Summed cross-entropy that keeps nothing but the logits themselves, and computes softmax twice for it.

    With an index, it is over these rows of the logits; without, over all, and targets may be -100.
    """

    @staticmethod
    def forward(ctx: Any, flat: Tensor, targets: Tensor, index: Tensor | None) -> Tensor:
        ctx.save_for_backward(flat, targets, index)
        total = flat.new_zeros((), dtype=torch.float32)
        for part in _chunks(len(targets), flat.shape[-1]):
            rows = flat[part] if index is None else flat.index_select(0, index[part])
            total += F.cross_entropy(rows.float(), targets[part], ignore_index=IGNORE, reduction="sum")
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        flat, targets, index = ctx.saved_tensors
        out = torch.empty_like(flat) if index is None else torch.zeros_like(flat)
        for part in _chunks(len(targets), flat.shape[-1]):
            wanted = targets[part, None]
            if index is None and out.dtype == torch.float32:
                rows = torch.softmax(flat[part], -1, out=out[part])
            else:
                chosen = flat[part] if index is None else flat.index_select(0, index[part])
                rows = torch.softmax(chosen, -1, dtype=torch.float32)
            rows.scatter_add_(1, wanted.clamp(min=0), rows.new_full(wanted.shape, -1.0))
            rows *= (wanted != IGNORE) * grad
            if index is not None:
                out.index_copy_(0, index[part], rows.to(out.dtype))
            elif out.dtype != torch.float32:
                out[part] = rows
        return out, None, None


def classification_loss(logits: Tensor, labels: Tensor) -> tuple[Tensor, int]:
    """Cross-entropy of classes, summed over the examples.

    Parameters
    ----------
    logits
        (n, C).
    labels
        (n,), -100 to leave an example out.

    Returns
    -------
    tuple[Tensor, int]
        The sum as a float32 scalar with gradient, and the number of examples.

    Raises
    ------
    ValueError
        Shapes that do not fit, or a label outside the classes.
    """
    _check_classes(logits, labels)
    loss = F.cross_entropy(logits.float(), labels, ignore_index=IGNORE, reduction="sum")
    return loss, count_labels(labels)


def _check_classes(logits: Tensor, labels: Tensor) -> None:
    if logits.dim() != 2 or labels.shape != logits.shape[:1]:
        raise ValueError(
            f"Expected logits (n, C) and labels (n,), found {tuple(logits.shape)} and {tuple(labels.shape)}."
        )
    hint = "give the model as many labels as the data has classes"
    _check_targets(labels[labels != IGNORE], logits.shape[-1], "number of classes", hint)


@dataclass(frozen=True)
class TokenTally:
    """Sums of an evaluation by tokens; tallies of batches add up to that of all."""

    loss: float = 0.0
    """Summed cross-entropy, in nats."""
    count: int = 0
    """Predictions."""
    correct: int = 0
    """Predictions whose most likely token is the label."""

    def __add__(self, other: TokenTally) -> TokenTally:
        return TokenTally(self.loss + other.loss, self.count + other.count, self.correct + other.correct)

    def metrics(self) -> dict[str, float]:
        """``loss`` (nats per token), ``perplexity``, ``token_accuracy``, ``count``; NaN where nothing was
        predicted.
        """
        if not self.count:
            return {"loss": math.nan, "perplexity": math.nan, "token_accuracy": math.nan, "count": 0}
        loss = self.loss / self.count
        perplexity = math.exp(loss) if loss < 700 else math.inf if loss == loss else math.nan
        return {
            "loss": loss,
            "perplexity": perplexity,
            "token_accuracy": self.correct / self.count,
            "count": self.count,
        }


@torch.no_grad()
def token_tally(logits: Tensor, labels: Tensor) -> TokenTally:
    """Evaluation sums of a batch: logits (n, L, V), labels (n, L)."""
    loss, count = causal_loss(logits, labels)
    # The targets' -100 is no token, so what is not predicted is never correct.
    correct = logits.argmax(-1).reshape(-1) == next_tokens(logits, labels)
    return TokenTally(float(loss), count, int(correct.sum()))


@dataclass(frozen=True)
class ClassTally:
    """Sums of an evaluation by classes."""

    loss: float = 0.0
    """Summed cross-entropy, in nats."""
    confusion: tuple[tuple[int, ...], ...] = ()
    """``confusion[i][j]``: examples of class i that were predicted as class j."""

    def __add__(self, other: ClassTally) -> ClassTally:
        if not self.confusion or not other.confusion:
            return ClassTally(self.loss + other.loss, self.confusion or other.confusion)
        if len(self.confusion) != len(other.confusion):
            raise ValueError(
                f"Cannot add tallies of {len(self.confusion)} and {len(other.confusion)} classes; "
                "both must come from one model."
            )
        pairs = zip(self.confusion, other.confusion, strict=True)
        summed = tuple(tuple(a + b for a, b in zip(x, y, strict=True)) for x, y in pairs)
        return ClassTally(self.loss + other.loss, summed)

    @property
    def count(self) -> int:
        """Examples."""
        return sum(map(sum, self.confusion))

    def metrics(self) -> dict[str, float]:
        """``loss``, ``accuracy``, ``macro_f1`` (mean over the classes that occur as label or prediction),
        ``count``.

        NaN where there was no example.
        """
        if not self.count:
            return {"loss": math.nan, "accuracy": math.nan, "macro_f1": math.nan, "count": 0}
        scores = []
        for i, row in enumerate(self.confusion):
            seen = sum(row) + sum(r[i] for r in self.confusion)  # 2 tp + fn + fp
            if seen:
                scores.append(2 * row[i] / seen)
        right = sum(row[i] for i, row in enumerate(self.confusion))
        return {
            "loss": self.loss / self.count,
            "accuracy": right / self.count,
            "macro_f1": sum(scores) / len(scores),
            "count": self.count,
        }


@torch.no_grad()
def class_tally(logits: Tensor, labels: Tensor) -> ClassTally:
    """Evaluation sums of a batch: logits (n, C), labels (n,)."""
    loss, _ = classification_loss(logits, labels)
    classes = logits.shape[-1]
    kept = labels != IGNORE
    cells = labels[kept] * classes + logits[kept].argmax(-1)
    counts = torch.bincount(cells, minlength=classes * classes).view(classes, classes)
    return ClassTally(float(loss), tuple(tuple(row) for row in counts.tolist()))
