"""Rows of tokens, the sets they make, and packing.

Every row keeps one rule: ``labels[t]`` is the token at t where it is to be predicted, from the tokens
before t, and -100 where it is not. Position 0 is always -100, since nothing comes before it; so the
number of labels of a row is the number of predictions that the loss averages over.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal

import torch
from torch import Tensor

from .data_errors import DataError
from .task import Examples

IGNORE = -100
"""The label of a position that is not predicted (the convention of torch and Hugging Face)."""

Truncation = Literal["right", "left", "drop"]
"""What happens to an example that is too long: cut its end, cut its beginning, or leave the example out."""


@dataclass(frozen=True, eq=False)
class Encoded:
    """One row: one example, one block of a document, or several packed examples.

    Attributes
    ----------
    input_ids
        Int32 tokens, (L,).
    labels
        Int32 labels with -100 where nothing is predicted, (L,); None for classification.
    position_ids
        Int32 (L,), restarting at 0 at each packed document; None for a row that holds one.
    label
        Class of a classification example.
    token_type_ids
        Int32 (L,), for encoders that tell the two texts of a pair apart.
    """

    input_ids: Tensor
    labels: Tensor | None = None
    position_ids: Tensor | None = None
    label: int | None = None
    token_type_ids: Tensor | None = None

    def __len__(self) -> int:
        return int(self.input_ids.shape[0])

    @property
    def label_count(self) -> int:
        """How many predictions the row is scored on: its labelled tokens, or 1 for a classification
        example.
        """
        if self.labels is None:
            return int(self.label is not None)
        return int((self.labels[1:] != IGNORE).sum())


@dataclass(frozen=True)
class EncodeReport:
    """What became of the records, so that nothing is left out silently."""

    records: int
    """Records given."""
    rows: int
    """Rows made of them (blocks and packs make this differ from ``kept``)."""
    kept: int
    """Records of which at least a part is in the rows."""
    dropped: Mapping[str, int]
    """Records left out entirely, by reason."""
    truncated: int
    """Records kept, but cut."""
    tokens: int
    """Tokens in all rows."""
    label_tokens: int
    """Predictions that an epoch is scored on."""
    notes: Mapping[str, int] = field(default_factory=dict)
    """Other losses, by kind (the tokens of blocks in which nothing can be predicted)."""

    def as_dict(self) -> dict[str, Any]:
        """The report as plain JSON values."""
        return {**self.__dict__, "dropped": dict(self.dropped), "notes": dict(self.notes)}

    def __str__(self) -> str:
        text = f"kept {self.kept} of {self.records} records in {self.rows} rows, {self.tokens} tokens"
        text += f" ({self.label_tokens} labelled)"
        if self.truncated:
            text += f", {self.truncated} truncated"
        for reason, count in {**self.dropped, **self.notes}.items():
            text += f", {count} {reason}"
        return text


@dataclass(frozen=True, eq=False)
class EncodedSet(Examples[Encoded]):
    """The examples of one text data set, and the report of how they came about."""

    @property
    def rows(self) -> tuple[Encoded, ...]:
        """The examples, under their earlier name."""
        return self.examples

    @property
    def lengths(self) -> list[int]:
        """Tokens of each example, as the length bucketing of a `BatchPlan` wants them."""
        return [len(row) for row in self.examples]

    def report_of(self, examples: Sequence[Encoded]) -> EncodeReport:
        """Return the report of examples taken out of a set: they are the records now."""
        return EncodeReport(
            records=len(examples),
            rows=len(examples),
            kept=len(examples),
            dropped={},
            truncated=0,
            tokens=sum(len(e) for e in examples),
            label_tokens=sum(e.label_count for e in examples),
        )

    def joined_report(self, sets: Sequence[Examples[Encoded]]) -> EncodeReport:
        """Return the report of several sets as one."""
        found = [s.report for s in sets if isinstance(s.report, EncodeReport)]
        sums = {f.name: sum(getattr(r, f.name) for r in found) for f in fields(EncodeReport) if f.type == "int"}
        counts: dict[str, dict[str, int]] = {"dropped": {}, "notes": {}}
        for name, total in counts.items():
            for report in found:
                for reason, count in getattr(report, name).items():
                    total[reason] = total.get(reason, 0) + count
        return EncodeReport(**sums, dropped=counts["dropped"], notes=counts["notes"])


class Builder:
    """Collects examples and counts what is lost on the way to an `EncodedSet`."""

    def __init__(self, max_length: int, truncation: Truncation = "right", prefix_length: int = 0) -> None:
        if max_length < 2:
            raise DataError(f"max_length must be at least 2 (one token predicts the next), found {max_length}.")
        if truncation not in ("right", "left", "drop"):
            raise DataError(f"Truncation must be 'right', 'left' or 'drop', found {truncation!r}.")
        self.max_length = max_length
        self.truncation = truncation
        self.prefix_length = min(prefix_length, max_length - 1)
        self.rows: list[Encoded] = []
        self.sources: list[int] = []  # the record that each row of `add` was made of
        self.records = 0
        self.truncated = 0
        self.dropped: dict[str, int] = {}
        self.notes: dict[str, int] = {}

    def drop(self, reason: str) -> None:
        """Count a record that is left out."""
        self.records += 1
        self.dropped[reason] = self.dropped.get(reason, 0) + 1

    def note(self, what: str, count: int) -> None:
        """Count another kind of loss."""
        self.notes[what] = self.notes.get(what, 0) + count

    def add(self, ids: list[int], labels: list[int]) -> None:
        """Add one example, cut to the maximum length, or drop it if no label is left."""
        labels = [IGNORE, *labels[1:]]
        if not any(label != IGNORE for label in labels):
            return self.drop("without anything to predict")
        cut = len(ids) > self.max_length
        if cut:
            if self.truncation == "drop":
                return self.drop("longer than max_length")
            ids, labels = self._cut(ids), self._cut(labels)
            labels[0] = IGNORE
            if not any(label != IGNORE for label in labels):
                return self.drop("with no label left after truncation")
        self.sources.append(self.records)
        self.records += 1
        self.truncated += cut
        self.rows.append(Encoded(ints(ids), ints(labels)))

    def _cut(self, values: list[int]) -> list[int]:
        if self.truncation == "right":
            return values[: self.max_length]
        head = self.prefix_length  # the beginning-of-text token stays where the model expects it
        return values[:head] + values[len(values) - (self.max_length - head) :]

    def finish(self, rows: Sequence[Encoded] | None = None) -> EncodedSet:
        """Make the set; ``rows`` replaces the collected examples where they were packed.

        Raises
        ------
        DataError
            No row is left; the message counts the reasons.
        """
        rows = self.rows if rows is None else rows
        if not rows:
            reasons = ", ".join(f"{n} {reason}" for reason, n in {**self.dropped, **self.notes}.items())
            raise DataError(
                f"None of the {self.records} records can be trained on ({reasons}); "
                f"check the columns, or raise max_length (now {self.max_length})."
            )
        report = EncodeReport(
            records=self.records,
            rows=len(rows),
            kept=self.records - sum(self.dropped.values()),
            dropped=dict(self.dropped),
            truncated=self.truncated,
            tokens=sum(len(r) for r in rows),
            label_tokens=sum(r.label_count for r in rows),
            notes=dict(self.notes),
        )
        return EncodedSet(tuple(rows), report)


def ints(values: Sequence[int]) -> Tensor:
    """Tokens as an int32 tensor."""
    return torch.tensor(values, dtype=torch.int32)


def pack_stream(documents: Sequence[Tensor], max_length: int) -> list[Encoded]:
    """Lay documents end to end and cut the stream into rows of ``max_length`` tokens, losing and repeating
    none.

    A row begins a new count of positions too, since a document cut by the end of a row cannot be seen from
    the next one. A row may be without labels (a last row of one token).

    Parameters
    ----------
    documents
        Int32 tokens (L_i,), each at least 1 long.
    max_length
        Tokens of a row.

    Returns
    -------
    list[Encoded]
        Rows with ``position_ids``; the last may be shorter.
    """
    if not documents:
        return []
    stream = torch.cat(list(documents))
    lengths = torch.tensor([len(d) for d in documents])
    is_start = torch.zeros(len(stream), dtype=torch.bool)
    is_start[lengths.cumsum(0) - lengths] = True
    rows = []
    for ids, starts in zip(torch.split(stream, max_length), torch.split(is_start, max_length), strict=True):
        starts[0] = True
        rows.append(_packed(ids, ids, starts))
    return rows


def pack_fit(rows: Sequence[Encoded], max_length: int) -> list[Encoded]:
    """Pack whole examples into rows of at most ``max_length`` tokens, by best fit on decreasing length.

    No example is cut. The order of the packs is that of their first examples, so it does not depend on
    anything but the input.

    Parameters
    ----------
    rows
        Examples with labels, none longer than ``max_length``.
    max_length
        Tokens of a row.
    """
    order = sorted(range(len(rows)), key=lambda i: (-len(rows[i]), i))
    by_space: dict[int, list[int]] = {}  # packs by the room they have left
    spaces: list[int] = []  # its keys, sorted
    packs: list[list[int]] = []
    for i in order:
        place = bisect_left(spaces, len(rows[i]))
        if place < len(spaces):
            space = spaces[place]
            pack = by_space[space].pop()
            if not by_space[space]:
                del by_space[space], spaces[place]
        else:
            space, pack = max_length, len(packs)
            packs.append([])
        packs[pack].append(i)
        left = space - len(rows[i])
        if left not in by_space:
            by_space[left] = []
            insort(spaces, left)
        by_space[left].append(pack)
    packed = []
    for members in sorted(sorted(p) for p in packs):
        ids = torch.cat([rows[i].input_ids for i in members])
        labels = torch.cat([_labels(rows[i]) for i in members])
        lengths = torch.tensor([len(rows[i]) for i in members])
        starts = torch.zeros(len(ids), dtype=torch.bool)
        starts[lengths.cumsum(0) - lengths] = True
        packed.append(_packed(ids, labels, starts))
    return packed


def one_row(rows: Sequence[Encoded]) -> Encoded:
    """Return rows one after another as one, with positions that begin anew at each."""
    counts = [torch.arange(len(r), dtype=torch.int32) if r.position_ids is None else r.position_ids for r in rows]
    return Encoded(torch.cat([r.input_ids for r in rows]), torch.cat([_labels(r) for r in rows]), torch.cat(counts))


def _labels(row: Encoded) -> Tensor:
    if row.labels is None:
        raise DataError("Classification examples cannot be packed: each needs a row of its own.")
    return row.labels


def _packed(ids: Tensor, labels: Tensor, is_start: Tensor) -> Encoded:
    index = torch.arange(len(ids))
    last_start = torch.where(is_start, index, 0).cummax(0).values
    positions = (index - last_start).to(torch.int32)
    return Encoded(ids.clone(), masked_starts(labels, is_start), positions)


def masked_starts(ids: Tensor, starts: Tensor) -> Tensor:
    """Labels equal to the tokens, but for those at ``starts`` (positions or a bool mask)."""
    labels = ids.clone()
    labels[starts] = IGNORE
    return labels
