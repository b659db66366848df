"""Attention over values in two parts as one Triton kernel: an online softmax that carries ``P V_base`` and ``P V_lr``.

Causal, with the queries at the end of the keys. Source: LRAgent, arXiv 2602.01053, algorithm 1. Ranks and widths need
be no powers of two; what lies beyond them is masked at every load and store.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_QUERIES, _KEYS = 16, 32


@triton.jit  # type: ignore[untyped-decorator]
def _split(  # type: ignore[no-untyped-def]
    q, k, v, low, up, out, scaling, heads, group, length, keys, rank,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, low_batch, low_row, out_batch, out_head,
    out_row, up_row,
    WIDTH: tl.constexpr, VALUE: tl.constexpr, RANK: tl.constexpr, WIDTHS: tl.constexpr, VALUES: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Compute one block of queries of one head."""
    pair = tl.program_id(1)
    batch, head = pair // heads, pair % heads
    shared = head // group
    rows = tl.program_id(0) * QUERIES + tl.arange(0, QUERIES)
    real = rows < length
    position = rows + keys - length
    width, wide, r = tl.arange(0, WIDTHS), tl.arange(0, VALUES), tl.arange(0, RANK)
    query = tl.load(
        q + batch * q_batch + head * q_head + rows[:, None] * q_row + width[None, :],
        mask=real[:, None] & (width[None, :] < WIDTH), other=0.0,
    )  # fmt: skip
    top = tl.full((QUERIES,), float("-inf"), dtype=tl.float32)
    norm = tl.zeros((QUERIES,), dtype=tl.float32)
    base = tl.zeros((QUERIES, VALUES), dtype=tl.float32)
    small = tl.zeros((QUERIES, RANK), dtype=tl.float32)
    last = tl.minimum((tl.program_id(0) + 1) * QUERIES, length) + keys - length
    for start in range(0, last, KEYS):
        column = start + tl.arange(0, KEYS)
        there = column < keys
        key = tl.load(
            k + batch * k_batch + shared * k_head + column[None, :] * k_row + width[:, None],
            mask=there[None, :] & (width[:, None] < WIDTH), other=0.0,
        )  # fmt: skip
        logits = tl.dot(query, key, allow_tf32=False) * scaling
        logits = tl.where(there[None, :] & (column[None, :] <= position[:, None]), logits, float("-inf"))
        higher = tl.maximum(top, tl.max(logits, 1))
        keep, share = tl.exp(top - higher), tl.exp(logits - higher[:, None])
        norm = norm * keep + tl.sum(share, 1)
        value = tl.load(
            v + batch * v_batch + shared * v_head + column[:, None] * v_row + wide[None, :],
            mask=there[:, None] & (wide[None, :] < VALUE), other=0.0,
        )  # fmt: skip
        part = tl.load(
            low + batch * low_batch + column[:, None] * low_row + r[None, :],
            mask=there[:, None] & (r[None, :] < rank), other=0.0,
        )  # fmt: skip
        base = base * keep[:, None] + tl.dot(share.to(value.dtype), value, allow_tf32=False)
        small = small * keep[:, None] + tl.dot(share.to(part.dtype), part, allow_tf32=False)
        top = higher
    factor = tl.load(
        up + (shared * VALUE + wide[None, :]) * up_row + r[:, None],
        mask=(wide[None, :] < VALUE) & (r[:, None] < rank), other=0.0,
    )  # fmt: skip
    whole = (base + tl.dot(small, factor.to(tl.float32), allow_tf32=False)) / norm[:, None]
    tl.store(
        out + batch * out_batch + head * out_head + rows[:, None] * out_row + wide[None, :],
        whole, mask=real[:, None] & (wide[None, :] < VALUE),
    )  # fmt: skip


def triton_split_attention(q: Tensor, k: Tensor, v: Tensor, low: Tensor, up: Tensor, scaling: float) -> Tensor:
    """Return causal attention over values in two parts; arguments are those of `split_attention`.

    The last dimension of every tensor must be dense. There is no backward pass: a cache has no gradient.
    """
    batch, heads, length, width = q.shape
    keys, value, rank = k.shape[2], v.shape[-1], low.shape[-1]
    q, k, v, low, up = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k, v, low, up))
    out = torch.empty(batch, heads, length, value, dtype=q.dtype, device=q.device)
    grid = (triton.cdiv(length, _QUERIES), batch * heads)
    with torch.cuda.device_of(q):
        _split[grid](
            q, k, v, low, up, out, scaling, heads, heads // k.shape[1], length, keys, rank,
            *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *low.stride()[:2], *out.stride()[:3], up.stride(0),
            WIDTH=width, VALUE=value, RANK=_power(rank), WIDTHS=_power(width), VALUES=_power(value),
            QUERIES=_QUERIES, KEYS=_KEYS,
        )  # fmt: skip
    return out


def _power(size: int) -> int:
    """Return the power of two that holds a dimension of a product on tensor cores."""
    return max(16, triton.next_power_of_2(size))
