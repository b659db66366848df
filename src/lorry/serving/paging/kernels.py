"""What computes: attention of a batch over keys and values on pages, each function with a plain reference.

On a GPU one kernel of `lorry.kernels.triton_paged` takes the whole batch; elsewhere decoding tokens and the chunks of
prompts go ways of their own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from lorry.kernels.grouped import has_kernels
from lorry.serving.paging.batch import Batch, Chunk, Decode, DecodeGroup


@dataclass(frozen=True)
class Attention:
    """What a layer's attention is beside its queries, keys and values.

    Attributes
    ----------
    scaling
        Factor of the logits.
    window
        How many tokens a token sees, itself among them; None for all before it.
    softcap
        Logits are ``softcap · tanh(logits / softcap)``; None for no cap.
    sinks
        A logit for each head that takes part in the softmax without a value; None for none.
    """

    scaling: float
    window: int | None = None
    softcap: float | None = None
    sinks: Tensor | None = None


class Scratch:
    """Memory for keys and values that are gathered from pages; the next layer uses it again.

    Fresh memory for each layer would cost as much as the copying: the system has to hand it out page by page.
    """

    def __init__(self) -> None:
        self._memory: dict[str, Tensor] = {}

    def gather(self, name: str, stored: Tensor, pages: Tensor) -> Tensor:
        """Return pages ``(len(pages), page_tokens, width)`` of a layer, valid until the next call with this name."""
        shape = (len(pages), *stored.shape[1:])
        size = math.prod(shape)
        memory = self._memory.get(name)
        if memory is None or len(memory) < size or memory.dtype != stored.dtype or memory.device != stored.device:
            memory = self._memory[name] = stored.new_empty(size + size // 2)
        return torch.index_select(stored, 0, pages, out=memory[:size].view(shape))


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keys: Tensor,
    values: Tensor,
    batch: Batch,
    how: Attention,
    scratch: Scratch | None = None,
    listed: bool = False,
) -> Tensor:
    """Return the attention's output ``(1, tokens, heads, width)`` for all parts of a batch.

    Parameters
    ----------
    q
        Queries ``(1, heads, tokens, width)``.
    k, v
        Keys and values of the batch's own tokens ``(1, kv_heads, tokens, width)``; they lie in the pages, too.
    keys, values
        A layer's pages ``(pages, page_tokens, kv_heads · width)``.
    batch
        Where everything lies.
    how
        What is computed.
    scratch
        Memory to use.
    listed
        Whether single tokens read keys and values where they lie; see `Store`.
    """
    if has_kernels(q):
        from lorry.kernels.triton_paged import paged_attention, serves

        if serves(q):
            options = (how.scaling, how.window, how.softcap, how.sinks)
            return paged_attention(q[0].transpose(0, 1), keys, values, k.shape[1], batch.table, *options)[None]
    scratch = Scratch() if scratch is None else scratch
    kv_heads, flat, decode = k.shape[1], q[0].transpose(0, 1), batch.decode
    if decode is not None and not batch.chunks:
        return attend_decode(flat, keys, values, kv_heads, decode, how, scratch, listed)[None]
    out = q.new_empty(q.shape[2], q.shape[1], v.shape[-1])
    if decode is not None:
        out[decode.rows] = attend_decode(flat[decode.rows], keys, values, kv_heads, decode, how, scratch, listed)
    for chunk in batch.chunks:
        own = (k[:, :, chunk.rows], v[:, :, chunk.rows])
        if chunk.start:
            own = gathered(keys, values, chunk.pages, chunk.stop, kv_heads, scratch)
        out[chunk.rows] = attend_chunk(q[:, :, chunk.rows], *own, chunk, how)
    return out[None]


def gathered(
    keys: Tensor, values: Tensor, pages: Tensor, length: int, kv_heads: int, scratch: Scratch
) -> tuple[Tensor, Tensor]:
    """Return keys and values ``(1, kv_heads, length, width)`` of one sequence from its pages."""
    found = [scratch.gather(name, stored, pages) for name, stored in (("keys", keys), ("values", values))]
    k, v = (each.flatten(0, 1)[:length].unflatten(1, (kv_heads, -1)).transpose(0, 1)[None] for each in found)
    return k, v


def attend_chunk(q: Tensor, k: Tensor, v: Tensor, chunk: Chunk, how: Attention) -> Tensor:
    """Return the output ``(tokens, heads, width)`` of several tokens of one sequence over all its keys."""
    groups = q.shape[1] // k.shape[1]
    if groups > 1:
        k, v = (each[:, :, None].expand(-1, -1, groups, -1, -1).flatten(1, 2) for each in (k, v))
    whole = chunk.start == 0 and (how.window is None or chunk.stop <= how.window)
    if how.softcap is None and how.sinks is None:
        mask = None if whole else chunk.mask(how.window, q.dtype)
        found = F.scaled_dot_product_attention(q, k, v, mask, is_causal=whole, scale=how.scaling)
    else:
        found = _by_logits(q, k, v, chunk.mask(how.window, q.dtype), how)
    return found[0].transpose(0, 1)


def attend_decode(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    kv_heads: int,
    decode: Decode,
    how: Attention,
    scratch: Scratch,
    listed: bool,
) -> Tensor:
    """Return the output ``(rows, heads, width)`` of rows of one token ``(rows, heads, width)`` over their pages."""
    if listed:
        return attend_listed(q, keys, values, kv_heads, decode, how)
    groups = decode.groups
    if len(groups) == 1:
        return attend_group(q, keys, values, kv_heads, groups[0], how, scratch)
    out = q.new_empty(*q.shape[:2], values.shape[-1] // kv_heads)
    for group in groups:
        out[group.rows] = attend_group(q[group.rows], keys, values, kv_heads, group, how, scratch)
    return out


def attend_listed(q: Tensor, keys: Tensor, values: Tensor, kv_heads: int, decode: Decode, how: Attention) -> Tensor:
    """Return the output of rows of one token, each query by the list of the keys and values that it sees."""
    rows, heads, width = q.shape
    lists = decode.lists(heads, kv_heads, keys.stride(0) // width, how.window, q.dtype)
    logits = lists.dots(q.reshape(-1, width), _as_rows(keys, width)).mul_(how.scaling)
    if how.softcap is not None:
        logits = how.softcap * torch.tanh(logits / how.softcap)
    sinks = None if how.sinks is None else how.sinks.to(q.dtype).repeat(rows)
    return lists.sums(lists.softmax(logits, sinks), _as_rows(values, width)).view(rows, heads, width)


def _as_rows(stored: Tensor, width: int) -> Tensor:
    """Return a layer's pages, and what else is on them from its first one on, as a matrix of heads' vectors."""
    behind = (stored.shape[0] - 1) * stored.stride(0) + stored.shape[1] * stored.shape[2]
    return stored.as_strided((behind // width, width), (width, 1))


def attend_group(
    q: Tensor, keys: Tensor, values: Tensor, kv_heads: int, group: DecodeGroup, how: Attention, scratch: Scratch
) -> Tensor:
    """Return the output of rows of one token and of similar lengths, whose pages are copied side by side."""
    rows = len(q)
    k, v = (
        scratch.gather(name, stored, group.pages).view(rows, -1, kv_heads, stored.shape[-1] // kv_heads)
        for name, stored in (("keys", keys), ("values", values))
    )
    # heads that share keys are like several queries of one head
    shared = q.reshape(rows, kv_heads, -1, q.shape[-1])
    mask = group.mask(how.window, q.dtype)
    k, v = k.transpose(1, 2), v.transpose(1, 2)
    if how.softcap is None and how.sinks is None:
        found = F.scaled_dot_product_attention(shared, k, v, mask, scale=how.scaling)
    else:
        sinks = None if how.sinks is None else how.sinks.view(kv_heads, -1, 1)
        found = _by_logits(shared, k, v, mask, how, sinks)
    return found.flatten(1, 2)


def _by_logits(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, how: Attention, sinks: Tensor | None = None) -> Tensor:
    """Return the output where the logits are changed before the softmax."""
    logits = q @ k.mT * how.scaling
    if how.softcap is not None:
        logits = how.softcap * torch.tanh(logits / how.softcap)
    logits = (logits + mask).to(torch.promote_types(logits.dtype, torch.float32))
    if how.sinks is None:
        return logits.softmax(-1).to(v.dtype) @ v
    sinks = how.sinks.view(-1, 1, 1) if sinks is None else sinks
    sink = sinks.to(logits.dtype).expand(*logits.shape[:-1], 1)
    return torch.cat([logits, sink], -1).softmax(-1)[..., :-1].to(v.dtype) @ v


def reference(q: Tensor, k: Tensor, v: Tensor, start: int, how: Attention) -> Tensor:
    """Return the attention ``(tokens, heads, width)`` of one sequence by plain operations; this is the definition.

    Parameters
    ----------
    q
        Queries ``(tokens, heads, width)``, the first one at position `start`.
    k, v
        All keys and values ``(length, kv_heads, width)`` of the sequence.
    start
        Position of the first query.
    how
        What is computed.
    """
    times = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(times, 1), v.repeat_interleave(times, 1)
    logits = torch.einsum("qhd,khd->hqk", q, k) * how.scaling
    if how.softcap is not None:
        logits = how.softcap * torch.tanh(logits / how.softcap)
    at, to = torch.arange(start, start + len(q))[:, None], torch.arange(len(k))
    seen = (to <= at) if how.window is None else (to <= at) & (to > at - how.window)
    logits = logits.masked_fill(~seen, float("-inf"))
    if how.sinks is not None:
        logits = torch.cat([logits, how.sinks.view(-1, 1, 1).expand(-1, len(q), 1)], -1)
    return torch.einsum("hqk,khd->qhd", logits.softmax(-1)[..., : len(k)], v)
