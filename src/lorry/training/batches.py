"""The order in which a job sees its rows, and the tensors made of them."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from .data_errors import DataError
from .rows import IGNORE, Encoded


@dataclass(frozen=True)
class BatchPlan:
    """The order of batches as a pure function of (seed, epoch): no state, nothing of the machine or the
    process.

    Raises
    ------
    DataError
        No rows, a batch size below 1, fewer rows than a batch with ``drop_last``, or bucketing
        without lengths.
    """

    examples: int
    """Number of examples in the set."""
    batch_size: int
    """Rows of a batch; the last of an epoch may be smaller."""
    seed: int = 0
    """Seed of the shuffles of all epochs."""
    shuffle: bool = True
    """Draw a new order in each epoch."""
    bucket_window: int = 0
    """Sort by length within windows of this many batches, then shuffle the batches; 0 does not. Saves
    padding."""
    drop_last: bool = False
    """Leave out the smaller last batch of each epoch."""
    epochs: int | None = None
    """Number of epochs; None goes on for ever."""
    lengths: tuple[int, ...] | None = None
    """Tokens of each row; needed for bucketing alone."""
    groups: tuple[int, ...] | None = None
    """Group of each row, where rows of different groups cannot lie in one batch."""

    def __post_init__(self) -> None:
        if self.examples < 1:
            raise DataError("No rows to make batches of.")
        if self.batch_size < 1:
            raise DataError(f"The batch size must be at least 1, found {self.batch_size}.")
        if self.drop_last and self.examples < self.batch_size:
            raise DataError(
                f"drop_last with batches of {self.batch_size} leaves nothing of {self.examples} rows; "
                "use a smaller batch size or drop_last=False."
            )
        if self.epochs is not None and self.epochs < 1:
            raise DataError(f"The number of epochs must be at least 1, found {self.epochs}.")
        if self.bucket_window < 0:
            raise DataError(f"bucket_window must be at least 0, found {self.bucket_window}.")
        if self.bucket_window and (self.lengths is None or len(self.lengths) != self.examples):
            found = "none" if self.lengths is None else str(len(self.lengths))
            raise DataError(f"Length bucketing needs the lengths of all {self.examples} rows, found {found}.")

    @property
    def batches_per_epoch(self) -> int:
        """Batches of one epoch."""
        counts = [self.examples] if self.groups is None else list(Counter(self.groups).values())
        rounded = math.floor if self.drop_last else math.ceil
        return sum(rounded(count / self.batch_size) for count in counts)

    def epoch(self, epoch: int) -> tuple[tuple[int, ...], ...]:
        """The batches of an epoch, each a tuple of row numbers; every row at most once, and all without
        `drop_last`.
        """
        order = list(range(self.examples))
        generator = torch.Generator().manual_seed(_mix(self.seed, epoch))
        if self.shuffle:
            order = torch.randperm(self.examples, generator=generator).tolist()
        size = self.batch_size
        if self.groups is not None:
            return self._grouped(order, generator)
        if self.drop_last:
            order = order[: len(order) - len(order) % size]
        if self.bucket_window and self.lengths is not None:
            lengths, window = self.lengths, self.bucket_window * size
            # A stable sort keeps the shuffled order of rows of one length.
            order = [
                row
                for begin in range(0, len(order), window)
                for row in sorted(order[begin : begin + window], key=lambda r: lengths[r])
            ]
        batches = [tuple(order[i : i + size]) for i in range(0, len(order), size)]
        if self.bucket_window and self.shuffle:
            batches = [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]
        return tuple(batches)

    def _grouped(self, order: Sequence[int], generator: torch.Generator) -> tuple[tuple[int, ...], ...]:
        """The batches of an order, none with rows of two groups."""
        assert self.groups is not None
        apart: dict[int, list[int]] = {}
        for row in order:
            apart.setdefault(self.groups[row], []).append(row)
        size = self.batch_size
        batches = [tuple(rows[i : i + size]) for rows in apart.values() for i in range(0, len(rows), size)]
        batches = [b for b in batches if len(b) == size or not self.drop_last]
        if self.shuffle:
            batches = [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]
        return tuple(batches)

    def fingerprint(self) -> dict[str, Any]:
        """What must be equal for a saved position to mean the same batch, as plain JSON."""
        values = asdict(self)
        values["rows"] = values.pop("examples")  # as checkpoints have always called them
        del values["epochs"]  # a run may be resumed for longer
        if values["lengths"] is not None:
            text = ",".join(map(str, values["lengths"]))
            values["lengths"] = hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
        return values


def groups_of(kinds: Sequence[Hashable]) -> tuple[int, ...] | None:
    """Return the group of each row by what it is, numbered in the order in which they come; None if all are alike."""
    numbers: dict[Hashable, int] = {}
    found = tuple(numbers.setdefault(kind, len(numbers)) for kind in kinds)
    return found if len(numbers) > 1 else None


def _mix(seed: int, epoch: int) -> int:
    """One 63-bit seed from both: seeds that differ by one must not share epochs."""
    digest = hashlib.blake2b(f"{seed}/{epoch}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


class BatchCursor(Iterator[tuple[int, ...]]):
    """A position in a `BatchPlan`, which can be saved as JSON and taken up again."""

    def __init__(self, plan: BatchPlan) -> None:
        self.plan = plan
        self.epoch = 0
        self.position = 0
        self._batches: tuple[int, tuple[tuple[int, ...], ...]] | None = None  # of the epoch last drawn from

    def __next__(self) -> tuple[int, ...]:
        """The row numbers of the next batch."""
        epoch, position = self.epoch, self.position
        if position == self.plan.batches_per_epoch:
            epoch, position = epoch + 1, 0
        if self.plan.epochs is not None and epoch >= self.plan.epochs:
            raise StopIteration
        self.epoch, self.position = epoch, position + 1
        if self._batches is None or self._batches[0] != epoch:
            self._batches = (epoch, self.plan.epoch(epoch))
        return self._batches[1][position]

    def ahead(self) -> BatchCursor:
        """Return another cursor at the same position, to see what comes next."""
        other = BatchCursor(self.plan)
        other.epoch, other.position, other._batches = self.epoch, self.position, self._batches
        return other

    @property
    def batches_seen(self) -> int:
        """Batches handed out since the beginning."""
        return self.epoch * self.plan.batches_per_epoch + self.position

    def state(self) -> dict[str, Any]:
        """Where the cursor stands, as plain JSON: epoch, batches handed out in it, and the plan's
        fingerprint.
        """
        return {"epoch": self.epoch, "position": self.position, "plan": self.plan.fingerprint()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go to a saved state.

        Raises
        ------
        DataError
            The state is of another plan (names what differs), or is no state at all.
        """
        missing = {"epoch", "position", "plan"} - set(state)
        if missing:
            raise DataError(f"Not a saved batch position: it lacks {', '.join(sorted(missing))}.")
        mine, saved = self.plan.fingerprint(), dict(state["plan"])
        differing = sorted(k for k in mine.keys() | saved.keys() if mine.get(k) != saved.get(k))
        if differing:
            found = ", ".join(f"{k} was {saved.get(k)}, now {mine.get(k)}" for k in differing)
            raise DataError(
                f"Cannot resume: the data order has changed ({found}); resume with the same data and options."
            )
        epoch, position = int(state["epoch"]), int(state["position"])
        if epoch < 0 or not 0 <= position <= self.plan.batches_per_epoch:
            raise DataError(f"Not a position of this plan: epoch {epoch}, batch {position}.")
        self.epoch, self.position = epoch, position


def collate(
    rows: Sequence[Encoded],
    pad_id: int | None,
    pad_to_multiple: int | None = None,
    side: Literal["right", "left"] = "right",
) -> dict[str, Tensor]:
    """Pad rows to one length and stack them. The rows may come from several jobs.

    Parameters
    ----------
    rows
        The n rows, all with labels or all with a class.
    pad_id
        Token that fills up; any token will do, since the mask hides it.
    pad_to_multiple
        Round the length up to a multiple of this.
    side
        Where the padding goes.

    Returns
    -------
    dict[str, Tensor]
        int64 tensors: ``input_ids`` and ``attention_mask`` (n, L); ``labels`` (n, L) with -100 in the
        padding, or (n,) for classes; ``position_ids`` (n, L) if a row is packed (see `block_mask`);
        ``token_type_ids`` (n, L) if a row has them.

    Raises
    ------
    DataError
        No rows, no ``pad_id``, or rows of both kinds.
    """
    if not rows:
        raise DataError("No rows to make a batch of.")
    if pad_id is None:
        raise DataError("No padding token: give pad_id (the end-of-text token will do, the mask hides it).")
    classes = [row.label for row in rows if row.labels is None]
    if classes and (len(classes) != len(rows) or None in classes):
        raise DataError("A batch holds either rows with token labels or classification examples, not both.")
    length = max(len(row) for row in rows)
    if pad_to_multiple:
        length = -(-length // pad_to_multiple) * pad_to_multiple

    def stack(values: Sequence[Tensor], fill: int) -> Tensor:
        return _stacked(values, fill, length, side)

    batch = {
        "input_ids": stack([row.input_ids for row in rows], pad_id),
        "attention_mask": stack([torch.ones_like(row.input_ids) for row in rows], 0),
    }
    if classes:
        batch["labels"] = torch.tensor([row.label for row in rows], dtype=torch.int64)
    else:
        batch["labels"] = stack([row.labels for row in rows if row.labels is not None], IGNORE)
    if any(row.position_ids is not None for row in rows):
        counts = [torch.arange(len(r)) if r.position_ids is None else r.position_ids for r in rows]
        batch["position_ids"] = stack(counts, 0)
    if any(row.token_type_ids is not None for row in rows):
        types = [torch.zeros_like(r.input_ids) if r.token_type_ids is None else r.token_type_ids for r in rows]
        batch["token_type_ids"] = stack(types, 0)
    return batch


def _stacked(values: Sequence[Tensor], fill: int, length: int, side: str) -> Tensor:
    out = torch.full((len(values), length), fill, dtype=torch.int64)
    for i, value in enumerate(values):
        if side == "right":
            out[i, : len(value)] = value
        else:
            out[i, length - len(value) :] = value
    return out


def block_mask(position_ids: Tensor, attention_mask: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """The attention mask of packed rows: each token sees its own document up to itself, and no other
    document.

    Pass it to the model as ``attention_mask``, together with ``position_ids``. (With right-side padding and
    ``use_cache=False``, leaving the attention mask out has the same effect on transformers' causal models,
    which then read the borders from the position ids.)

    Parameters
    ----------
    position_ids
        (n, L), restarting at 0 at each document.
    attention_mask
        (n, L), 1 for tokens and 0 for padding.
    dtype
        None gives a bool mask, as SDPA takes; a float dtype gives 0 and the lowest value, as eager
        attention takes.

    Returns
    -------
    Tensor
        (n, 1, L, L). A padding position sees itself alone, so that no softmax is over nothing.
    """
    length = position_ids.shape[1]
    padding = attention_mask == 0
    document = ((position_ids == 0) | padding).cumsum(1)
    same = document[:, :, None] == document[:, None, :]
    causal = torch.ones(length, length, dtype=torch.bool, device=position_ids.device).tril()
    allowed = same & causal
    allowed = (allowed & ~padding[:, None, :]) | torch.eye(length, dtype=torch.bool, device=allowed.device)
    if dtype is not None:
        return torch.where(allowed, 0.0, torch.finfo(dtype).min).to(dtype)[:, None]
    return allowed[:, None]
