"""Vectors of texts that lie near each other where the texts belong together."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from lorry.core.life.api import context
from lorry.training.columns import find_column, texts_of, value_at
from lorry.training.data import Record
from lorry.training.data_errors import DataError
from lorry.training.encode import encode_classification
from lorry.training.reference import asking
from lorry.training.rows import Encoded, Truncation
from lorry.training.task import Batch, Examples, PlainReport, Setting, register_task
from lorry.training.text_task import TextPass, TextTask

ANCHOR_COLUMNS = ("anchor", "query", "question", "sentence1", "text")
POSITIVE_COLUMNS = ("positive", "answer", "passage", "sentence2", "document")
NEGATIVE_COLUMNS = ("negative", "negatives", "hard_negative", "hard_negatives")


@dataclass(frozen=True, eq=False)
class Found:
    """Vectors of an evaluation, for retrieval among all of its texts.

    Attributes
    ----------
    loss, count
        Summed loss, and anchors.
    anchors, positives
        ``(n, d)`` of length 1, positives in the order of the anchors.
    negatives
        ``(m, d)``, which are searched, too.
    """

    loss: float
    count: int
    anchors: Tensor
    positives: Tensor
    negatives: Tensor

    def __add__(self, other: Found) -> Found:
        """Return both together."""
        pairs = zip(
            (self.anchors, self.positives, self.negatives),
            (other.anchors, other.positives, other.negatives),
            strict=True,
        )
        return Found(self.loss + other.loss, self.count + other.count, *(torch.cat(pair) for pair in pairs))

    def metrics(self) -> dict[str, float]:
        """Return ``loss``, ``retrieval_accuracy`` (own text first), ``mrr`` (mean of 1 / rank) and ``count``."""
        candidates = torch.cat([self.positives, self.negatives])
        scores = self.anchors @ candidates.T
        # what is as near as the own text comes before it, unless it is the same text
        other = self.positives @ candidates.T < 1 - 1e-6
        rank = 1 + ((scores >= scores.diagonal()[:, None]) & other).sum(1)
        return {
            "loss": self.loss / self.count,
            "retrieval_accuracy": float((rank == 1).double().mean()),
            "mrr": float((1 / rank.double()).mean()),
            "count": self.count,
        }


@register_task
@dataclass(frozen=True)
class Embedding(TextTask):
    """Embeddings by contrast: a text is nearer to the one it belongs to than to those of the others in a micro-batch.

    Van den Oord et al. 2018 (InfoNCE); every positive and negative of the micro-batch is a candidate for each anchor,
    so larger micro-batches are harder. Hard negatives are a column, or mined with the base before training.
    """

    name: ClassVar[str] = "embedding"
    by_example: ClassVar[bool] = False
    task: ClassVar[str | None] = "features"
    best: ClassVar[tuple[str, Literal["min", "max"]]] = ("retrieval_accuracy", "max")
    max_length: int = 256
    """Tokens of a text; longer ones are cut."""
    anchor_column: str | None = None
    """Column of the text that is searched with; guessed if not named."""
    positive_column: str | None = None
    """Column of the text that it belongs to; guessed if not named."""
    negative_column: str | None = None
    """Column of a text, or a list of texts, that it does not belong to; guessed, and may be missing."""
    mined: int = 0
    """Hard negatives to find for each anchor among the positives of others, with the base."""
    temperature: float = 0.05
    """Divides the cosines."""
    pooling: Literal["mean", "cls", "last"] = "mean"
    """Which vector stands for a text: the mean of its tokens, the first, or the last."""
    truncation: Truncation = "right"
    """``right`` cuts long texts."""

    def examples(
        self, setting: Setting, records: Sequence[Record], labels: Sequence[str] | None = None
    ) -> Examples[Any]:
        """Encode records, and mine negatives."""
        found = super().examples(setting, records, labels)
        return self._with_mined(setting, found) if self.mined else found

    def encode(
        self, tokenizer: Any, records: Sequence[Record], *, labels: Sequence[str] | None = None
    ) -> Examples[Any]:
        """Encode texts; an example is an anchor, its positive, and any number of negatives."""
        anchor = find_column(records, self.anchor_column, ANCHOR_COLUMNS, "text to search with", "anchor_column")
        positive = find_column(records, self.positive_column, POSITIVE_COLUMNS, "text to find", "positive_column")
        if anchor == positive:
            raise DataError(f"The column {anchor!r} cannot be both anchor and positive; name both.")
        negative = self.negative_column or next((c for c in NEGATIVE_COLUMNS if c in records[0]), None)
        groups = [
            [a, p, *(_texts(value_at(r, negative, i), i, negative) if negative else [])]
            for i, (a, p, r) in enumerate(
                zip(texts_of(records, anchor), texts_of(records, positive), records, strict=True)
            )
        ]
        kept = [group for group in groups if all(text.strip() for text in group)]
        flat = [text for group in kept for text in group]
        roles = [min(i, 2) for group in kept for i in range(len(group))]
        made = encode_classification(tokenizer, flat, roles, max_length=self.max_length) if flat else None
        if made is None or len(made) != len(flat):
            raise DataError(f"Some of the {len(records)} records have texts without tokens; check the columns.")
        rows, examples = iter(made.examples), []
        for group in kept:
            examples.append(tuple(next(rows) for _ in group))
        return Examples(tuple(examples), PlainReport(len(records), len(examples)))

    def count(self, example: Any) -> int:
        """Return 1: one text is searched for."""
        return 1

    @property
    def family(self) -> str:
        """Rows that become vectors."""
        return f"text, vectors, {self.pooling}"

    def forward(self, setting: Setting, batch: Batch) -> Tensor:
        """Return a vector of length 1 for each row, ``(n, d)``."""
        hidden = setting.model(**batch.inputs, **TextPass.of(setting).extra).last_hidden_state
        mask = batch.inputs["attention_mask"]
        if self.pooling == "mean":
            vectors = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        else:
            places = mask.sum(1) - 1 if self.pooling == "last" else torch.zeros_like(mask[:, 0])
            vectors = hidden[torch.arange(len(hidden), device=hidden.device), places]
        return F.normalize(vectors.to(torch.promote_types(vectors.dtype, torch.float32)), dim=-1)

    def losses(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Return the loss of each anchor among all candidates of the rows."""
        anchors, candidates = outputs[targets == 0], torch.cat([outputs[targets == 1], outputs[targets == 2]])
        wanted = torch.arange(len(anchors), device=anchors.device)
        losses = F.cross_entropy(anchors @ candidates.T / self.temperature, wanted, reduction="none")
        return losses, torch.ones_like(losses)

    def loss(self, outputs: Any, targets: Any) -> tuple[Tensor, int]:
        """Return the summed loss, and the number of anchors."""
        losses, _ = self.losses(outputs, targets)
        return losses.sum(), len(losses)

    def tally(self, outputs: Tensor, targets: Tensor) -> Found:
        """Return the loss, and the vectors, among all of which own texts are looked for in the end."""
        losses, _ = self.losses(outputs, targets)
        parts = (outputs[targets == role].detach().double().cpu() for role in range(3))
        return Found(float(losses.double().sum()), len(losses), *parts)

    def _with_mined(self, setting: Setting, found: Examples[Any]) -> Examples[Any]:
        """Add to each example the positives of others that the base takes for nearest, other texts than its own."""
        anchors, positives = (self._vectors(setting, [e[i] for e in found.examples]) for i in (0, 1))
        texts = [tuple(e[1].input_ids.tolist()) for e in found.examples]
        examples = []
        for i, example in enumerate(found.examples):
            order = (positives @ anchors[i]).argsort(descending=True).tolist()
            own = {texts[i], tuple(example[0].input_ids.tolist())}
            chosen = [j for j in order if texts[j] not in own][: self.mined]
            examples.append((*example, *(replace(found.examples[j][1], label=2) for j in chosen)))
        return Examples(tuple(examples), found.report)

    def _vectors(self, setting: Setting, rows: Sequence[Encoded]) -> Tensor:
        parts = []
        for start in range(0, len(rows), 64):
            batch = self.collate(setting, rows[start : start + 64])
            count = len(rows[start : start + 64])
            with asking(setting.model, None, count), context(setting.model, **batch.facts):
                parts.append(self.forward(setting, batch))
        return torch.cat(parts)


def _texts(value: Any, index: int, column: str) -> list[str]:
    if value in (None, ""):
        return []
    if isinstance(value, str) and value.startswith("["):
        try:
            value = json.loads(value)
        except ValueError:
            return [value]
    found = [value] if isinstance(value, str) else value
    if not isinstance(found, list) or not all(isinstance(text, str) for text in found):
        raise DataError(f"Record {index}: column {column!r} holds {value!r}, expected a text or a list of texts.")
    return found
