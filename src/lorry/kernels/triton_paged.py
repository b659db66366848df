"""Attention over keys and values on pages as one Triton kernel: prefill and decoding tokens of all sequences at once.

A program has a block of queries of one sequence and one head of keys. Query heads that share keys lie side by side in a
block, so that a single token fills it as far as it can, and keys are read once for all of them. Keys and values are
read on their pages; what a window hides is not read at all. Sums are in float32 (float64 for float64).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lorry.kernels.page_table import PageTable
from lorry.kernels.triton_tuning import INTERPRETED

_QUERIES, _KEYS = 16, 32


@triton.jit  # type: ignore[untyped-decorator]
def _paged(  # type: ignore[no-untyped-def]
    q, keys, values, out, sinks, pages, spans, blocks, scaling, softcap, window, group, page_tokens,
    q_row, q_head, out_row, out_head, key_page, key_token, value_page, value_token,
    WIDTH: tl.constexpr, VALUE: tl.constexpr, WIDTHS: tl.constexpr, VALUES: tl.constexpr, QUERIES: tl.constexpr, KEYS:
    tl.constexpr, MATH: tl.constexpr, SUM: tl.constexpr, WINDOW: tl.constexpr, CAP: tl.constexpr, SINKS: tl.constexpr,
):  # fmt: skip
    """Compute one block of queries that share a head of keys."""
    shared = tl.program_id(1)
    span = spans + 4 * tl.load(blocks + 2 * tl.program_id(0))
    first = tl.load(blocks + 2 * tl.program_id(0) + 1)
    count, start, place = tl.load(span + 1), tl.load(span + 2), tl.load(span + 3)
    lane = first + tl.arange(0, QUERIES)
    token, head = lane // group, shared * group + lane % group
    real = token < count
    position = start + token
    row = (tl.load(span) + token).to(tl.int64)
    width, wide = tl.arange(0, WIDTHS), tl.arange(0, VALUES)
    query = tl.load(
        q + row[:, None] * q_row + head[:, None] * q_head + width[None, :],
        mask=real[:, None] & (width[None, :] < WIDTH), other=0.0,
    ).to(MATH)  # fmt: skip
    if SINKS:
        top = tl.load(sinks + head, mask=real, other=0.0).to(SUM)
        norm = tl.full((QUERIES,), 1.0, dtype=SUM)
    else:
        top = tl.full((QUERIES,), float("-inf"), dtype=SUM)
        norm = tl.zeros((QUERIES,), dtype=SUM)
    total = tl.zeros((QUERIES, VALUES), dtype=SUM)
    least = 0
    if WINDOW:
        least = tl.maximum(start + first // group - window + 1, 0) // KEYS * KEYS
    for begin in range(least, start + tl.minimum((first + QUERIES - 1) // group, count - 1) + 1, KEYS):
        column = begin + tl.arange(0, KEYS)
        there = column < start + count
        page = tl.load(pages + place + column // page_tokens, mask=there, other=0).to(tl.int64)
        key = tl.load(
            keys + (page * key_page + column % page_tokens * key_token + shared * WIDTH)[None, :] + width[:, None],
            mask=there[None, :] & (width[:, None] < WIDTH), other=0.0,
        ).to(MATH)  # fmt: skip
        logits = tl.dot(query, key, input_precision="ieee", out_dtype=SUM) * scaling
        if CAP:  # a tanh of what every version of Triton has
            logits = softcap * (1 - 2 / (tl.exp(2 * logits / softcap) + 1))
        seen = there[None, :] & (column[None, :] <= position[:, None])
        if WINDOW:
            seen = seen & (column[None, :] > position[:, None] - window)
        logits = tl.where(seen, logits, float("-inf"))
        higher = tl.maximum(top, tl.max(logits, 1))
        level = tl.where(higher == float("-inf"), 0.0, higher)  # nothing is seen in these keys, nor was before
        keep, share = tl.exp(top - level), tl.exp(logits - level[:, None])
        norm = norm * keep + tl.sum(share, 1)
        value = tl.load(
            values + (page * value_page + column % page_tokens * value_token + shared * VALUE)[:, None] + wide[None, :],
            mask=there[:, None] & (wide[None, :] < VALUE), other=0.0,
        ).to(MATH)  # fmt: skip
        total = total * keep[:, None] + tl.dot(share.to(MATH), value, input_precision="ieee", out_dtype=SUM)
        top = higher
    tl.store(
        out + row[:, None] * out_row + head[:, None] * out_head + wide[None, :],
        (total / norm[:, None]).to(out.dtype.element_ty), mask=real[:, None] & (wide[None, :] < VALUE),
    )  # fmt: skip


_TYPES = {torch.float64: tl.float64, torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def serves(q: Tensor) -> bool:
    """Whether the kernel takes queries of this type: on a GPU those that its matrix units know."""
    return q.dtype in _TYPES and (INTERPRETED or q.dtype != torch.float64)


def paged_attention(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    kv_heads: int,
    table: PageTable,
    scaling: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Return the causal attention's output ``(tokens, heads, value width)`` of all tokens of a batch.

    Parameters
    ----------
    q
        Queries ``(tokens, heads, width)``, the last dimension dense.
    keys, values
        A layer's pages ``(pages, page_tokens, kv_heads · width)``, the last dimension dense; those of the batch's own
        tokens lie there, too.
    kv_heads
        Heads of keys and values.
    table
        Where the sequences lie.
    scaling
        Factor of the logits.
    window
        How many tokens a token sees, itself among them; None for all before it.
    softcap
        Logits are ``softcap · tanh(logits / softcap)``; None for no cap.
    sinks
        A logit for each head ``(heads,)`` that takes part in the softmax without a value; None for none.
    """
    q = q if q.stride(-1) == 1 else q.contiguous()
    width, value = keys.shape[-1] // kv_heads, values.shape[-1] // kv_heads
    group = q.shape[1] // kv_heads
    out = q.new_empty(len(q), q.shape[1], value)
    blocks = table.blocks(group, _QUERIES)
    exact = q.dtype == torch.float64
    if not len(blocks):
        return out
    with torch.cuda.device_of(q):
        _paged[(len(blocks), kv_heads)](
            q, keys, values, out, q if sinks is None else sinks, table.pages, table.spans, blocks, scaling,
            1.0 if softcap is None else softcap, 0 if window is None else window, group, table.page_tokens,
            *q.stride()[:2], *out.stride()[:2], *keys.stride()[:2], *values.stride()[:2],
            WIDTH=width, VALUE=value, WIDTHS=_power(width), VALUES=_power(value), QUERIES=_QUERIES, KEYS=_KEYS,
            # the interpreter multiplies the bits of half precision as if they were numbers
            MATH=tl.float32 if INTERPRETED and not exact else _TYPES[q.dtype], SUM=tl.float64 if exact else tl.float32,
            WINDOW=window is not None, CAP=softcap is not None, SINKS=sinks is not None,
        )  # fmt: skip
    return out


def _power(size: int) -> int:
    """Return the power of two that holds a dimension of a product on tensor cores."""
    return max(16, triton.next_power_of_2(size))
