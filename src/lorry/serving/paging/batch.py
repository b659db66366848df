"""What all layers need to know of a batch, worked out once: where its tokens lie, and who attends to what."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

#: A group of decoding rows is split where its padding would cost more than this many times what is in it.
_PADDING = 1.5


@dataclass(frozen=True)
class Part:
    """The part of a batch that belongs to one sequence.

    Attributes
    ----------
    tokens
        Its tokens in this pass.
    start
        Position of the first of them: so many tokens lie in pages already.
    pages
        Page numbers, enough for all tokens up to the last.
    wanted
        Whether the logits of its last token are needed, of all tokens (``"all"``), or of none.
    """

    tokens: Sequence[int]
    start: int
    pages: Sequence[int]
    wanted: bool | str = True

    @property
    def stop(self) -> int:
        """Length of the sequence after this pass."""
        return self.start + len(self.tokens)


class Chunk:
    """Several tokens of one sequence, which see what lies in its pages and each other.

    Attributes
    ----------
    rows
        Where they are among the tokens of the batch.
    start, stop
        Position of the first one, and behind the last.
    pages
        The sequence's pages up to there.
    """

    def __init__(self, rows: slice, part: Part, page_tokens: int, device: torch.device) -> None:
        self.rows = rows
        self.start, self.stop = part.start, part.stop
        self.pages = torch.tensor(part.pages[: -(-part.stop // page_tokens)], device=device)
        self._device = device
        self._masks: dict[object, Tensor] = {}

    def mask(self, window: int | None, dtype: torch.dtype) -> Tensor:
        """Return what is added to the logits ``(tokens, stop)``: 0 where a token sees a key, else -inf."""
        found = self._masks.get((window, dtype))
        if found is None:
            keys = torch.arange(self.stop, device=self._device)
            seen = _visible(torch.arange(self.start, self.stop, device=self._device)[:, None], keys, window)
            found = self._masks[window, dtype] = _additive(seen, dtype)
        return found


class DecodeGroup:
    """Rows of one token each, of sequences of similar length.

    Attributes
    ----------
    rows
        Where they are among the tokens of the batch; a slice where they lie together.
    pages
        Pages of each row ``(rows · width,)``; short ones are filled up with any page.
    width
        Pages of the longest row.
    lengths
        Tokens that each row sees ``(rows,)``, itself among them.
    """

    def __init__(self, rows: slice | Tensor, parts: Sequence[Part], page_tokens: int, device: torch.device) -> None:
        self.rows = rows
        counts = [-(-part.stop // page_tokens) for part in parts]
        self.width = max(counts)
        padded: list[int] = []
        for part, count in zip(parts, counts, strict=True):
            padded += part.pages[:count]
            padded += [part.pages[0]] * (self.width - count)
        self.pages = torch.tensor(padded, device=device)
        self.lengths = torch.tensor([part.stop for part in parts], device=device)
        self._keys = self.width * page_tokens
        self._masks: dict[object, Tensor] = {}

    def mask(self, window: int | None, dtype: torch.dtype) -> Tensor:
        """Return what is added to the logits ``(rows, 1, 1, keys)``: 0 where a row sees a key, else -inf."""
        found = self._masks.get((window, dtype))
        if found is None:
            keys = torch.arange(self._keys, device=self.lengths.device)
            seen = _visible(self.lengths[:, None] - 1, keys, window)
            found = self._masks[window, dtype] = _additive(seen, dtype)[:, None, None]
        return found


@dataclass
class Batch:
    """One pass of the model over tokens of many sequences.

    Attributes
    ----------
    tokens, positions
        ``(1, tokens)``.
    pages, offsets
        Where the keys and values of each token are put ``(tokens,)``.
    groups, chunks
        How the tokens attend.
    wanted
        Which tokens' logits are needed ``(wanted,)``.
    lengths
        Tokens of each part.
    """

    tokens: Tensor
    positions: Tensor
    pages: Tensor
    offsets: Tensor
    groups: list[DecodeGroup]
    chunks: list[Chunk]
    wanted: Tensor
    lengths: tuple[int, ...]
    layer: int | None = field(default=None)

    @classmethod
    def of(cls, parts: Sequence[Part], page_tokens: int, device: torch.device) -> Batch:
        """Return the batch of parts, in their order."""
        tokens: list[int] = []
        positions: list[int] = []
        pages: list[int] = []
        wanted: list[int] = []
        singles: list[tuple[int, Part]] = []
        chunks = []
        for part in parts:
            first = len(tokens)
            tokens += part.tokens
            positions += range(part.start, part.stop)
            pages += [part.pages[p // page_tokens] for p in range(part.start, part.stop)]
            if part.wanted:
                wanted += range(first if part.wanted == "all" else len(tokens) - 1, len(tokens))
            if len(part.tokens) == 1:
                singles.append((first, part))
            else:
                chunks.append(Chunk(slice(first, len(tokens)), part, page_tokens, device))
        where = torch.tensor([tokens, positions, pages], device=device)
        return cls(
            where[:1],
            where[1:2],
            where[2],
            where[1] % page_tokens,
            _groups(singles, page_tokens, device),
            chunks,
            torch.tensor(wanted, dtype=torch.long, device=device),
            tuple(len(part.tokens) for part in parts),
        )


def _groups(singles: list[tuple[int, Part]], page_tokens: int, device: torch.device) -> list[DecodeGroup]:
    """Return groups of rows whose lengths are so similar that padding costs little."""
    if not singles:
        return []
    ordered = sorted(singles, key=lambda found: -found[1].stop)
    groups: list[list[tuple[int, Part]]] = [[]]
    held = 0
    for found in ordered:
        group, pages = groups[-1], -(-found[1].stop // page_tokens)
        if group and -(-group[0][1].stop // page_tokens) * (len(group) + 1) > _PADDING * (held + pages):
            groups.append(group := [])
            held = 0
        group.append(found)
        held += pages
    made = []
    for group in groups:
        group.sort(key=lambda found: found[0])
        index = [row for row, _ in group]
        together = index[-1] - index[0] + 1 == len(index)
        rows = slice(index[0], index[-1] + 1) if together else torch.tensor(index, device=device)
        made.append(DecodeGroup(rows, [part for _, part in group], page_tokens, device))
    return made


def _visible(queries: Tensor, keys: Tensor, window: int | None) -> Tensor:
    seen = keys <= queries
    return seen if window is None else seen & (keys > queries - window)


def _additive(seen: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, float("-inf"))
