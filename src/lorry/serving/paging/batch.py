"""What all layers need to know of a batch, worked out once: where its tokens lie, and who attends to what."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import torch
from torch import Tensor

from lorry.kernels.lists import RowLists, runs
from lorry.kernels.page_table import PageTable, Span

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
        Where they are among the rows of one token; a slice where they lie together.
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


class Decode:
    """All rows of one token each.

    Attributes
    ----------
    rows
        Where they are among the tokens of the batch; a slice where they lie together.
    """

    def __init__(self, places: list[int], parts: list[Part], page_tokens: int, device: torch.device) -> None:
        self.rows = _rows(places, device)
        self._parts, self._page_tokens, self._device = parts, page_tokens, device
        self._lists: dict[object, RowLists] = {}

    @cached_property
    def groups(self) -> list[DecodeGroup]:
        """Groups of rows whose lengths are so similar that padding costs little."""
        return _groups(list(enumerate(self._parts)), self._page_tokens, self._device)

    def lists(self, heads: int, kv_heads: int, page_rows: int, window: int | None, dtype: torch.dtype) -> RowLists:
        """Return which keys each query ``(rows · heads,)`` sees, where each key of a head is a row of a matrix.

        Parameters
        ----------
        heads, kv_heads
            Of queries, and of keys and values.
        page_rows
            How many rows there are from a page to the next; the first of them are the keys of a layer, token by token.
        window
            How many tokens a token sees, itself among them; None for all before it.
        dtype
            Of queries and keys.
        """
        key = (heads, kv_heads, page_rows, window, dtype)
        found = self._lists.get(key)
        if found is None:
            found = self._lists[key] = self._listed(heads, kv_heads, page_rows, window, dtype)
        return found

    def _listed(self, heads: int, kv_heads: int, page_rows: int, window: int | None, dtype: torch.dtype) -> RowLists:
        size, pages, starts = self._page_tokens, self._pages, self._starts
        stops = torch.tensor([part.stop for part in self._parts])
        low = torch.zeros_like(stops) if window is None else (stops - window).clamp_(min=0)
        skipped = low // size
        # a run for each page of each query
        query_row = torch.arange(len(stops)).repeat_interleave(heads)
        count = (-(-stops // size) - skipped)[query_row]
        row = query_row.repeat_interleave(count)
        place = runs((starts + skipped)[query_row], count)
        before = (place - starts[row]) * size
        first = (low[row] - before).clamp_(min=0)
        last = (stops[row] - before).clamp_(max=size)
        head = (torch.arange(heads) // (heads // kv_heads)).repeat(len(stops)).repeat_interleave(count)
        listed = runs(pages[place] * page_rows + first * kv_heads + head, last - first, kv_heads)
        return RowLists((stops - low)[query_row].to(self._device), listed.to(self._device), dtype)

    @cached_property
    def _pages(self) -> Tensor:
        """The pages of all rows, one row after another."""
        return torch.tensor([page for part in self._parts for page in part.pages])

    @cached_property
    def _starts(self) -> Tensor:
        """Where those of each row begin."""
        counts = torch.tensor([len(part.pages) for part in self._parts])
        return counts.cumsum(0) - counts


@dataclass
class Batch:
    """One pass of the model over tokens of many sequences.

    Attributes
    ----------
    tokens, positions
        ``(1, tokens)``.
    pages, offsets
        Where the keys and values of each token are put ``(tokens,)``.
    decode, chunks
        How the tokens attend: those that are alone, and several of one sequence.
    wanted
        Which tokens' logits are needed ``(wanted,)``.
    lengths
        Tokens of each part.
    parts, page_tokens
        What it was made of.
    """

    tokens: Tensor
    positions: Tensor
    pages: Tensor
    offsets: Tensor
    decode: Decode | None
    chunks: list[Chunk]
    wanted: Tensor
    lengths: tuple[int, ...]
    parts: tuple[Part, ...]
    page_tokens: int

    @cached_property
    def table(self) -> PageTable:
        """Where all sequences lie, for kernels that read pages."""
        rows = accumulate(self.lengths, initial=0)
        spans = [Span(row, len(p.tokens), p.start, p.pages) for row, p in zip(rows, self.parts, strict=False)]
        return PageTable(spans, self.page_tokens, self.tokens.device)

    @classmethod
    def of(cls, parts: Sequence[Part], page_tokens: int, device: torch.device) -> Batch:
        """Return the batch of parts, in their order."""
        tokens: list[int] = []
        positions: list[int] = []
        pages: list[int] = []
        wanted: list[int] = []
        places: list[int] = []
        singles: list[Part] = []
        chunks = []
        for part in parts:
            first = len(tokens)
            tokens += part.tokens
            positions += range(part.start, part.stop)
            pages += [part.pages[p // page_tokens] for p in range(part.start, part.stop)]
            if part.wanted:
                wanted += range(first if part.wanted == "all" else len(tokens) - 1, len(tokens))
            if len(part.tokens) == 1:
                places.append(first)
                singles.append(part)
            else:
                chunks.append(Chunk(slice(first, len(tokens)), part, page_tokens, device))
        where = torch.tensor([tokens, positions, pages], device=device)
        return cls(
            where[:1],
            where[1:2],
            where[2],
            where[1] % page_tokens,
            Decode(places, singles, page_tokens, device) if singles else None,
            chunks,
            torch.tensor(wanted, dtype=torch.long, device=device),
            tuple(len(part.tokens) for part in parts),
            tuple(parts),
            page_tokens,
        )


def _groups(singles: list[tuple[int, Part]], page_tokens: int, device: torch.device) -> list[DecodeGroup]:
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
        rows = _rows([row for row, _ in group], device)
        made.append(DecodeGroup(rows, [part for _, part in group], page_tokens, device))
    return made


def _rows(places: list[int], device: torch.device) -> slice | Tensor:
    """Return rising places as a slice, if they lie together."""
    together = places[-1] - places[0] + 1 == len(places)
    return slice(places[0], places[-1] + 1) if together else torch.tensor(places, device=device)


def _visible(queries: Tensor, keys: Tensor, window: int | None) -> Tensor:
    seen = keys <= queries
    return seen if window is None else seen & (keys > queries - window)


def _additive(seen: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, float("-inf"))
