"""Attention over values that are kept as a base part and a low-rank part.

A cache that roles with different adapters share holds ``V_base`` for each head and ``V_lr = X A`` once for all heads.
With P the probabilities, ``P (V_base + V_lr B) = P V_base + (P V_lr) B``, so that nothing of the width of the heads is
made of ``V_lr`` for each cached token. Source: LRAgent, arXiv 2602.01053, section 4.3 (Flash-LoRA-Attention).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

_Form = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, float, Tensor | None], Tensor]

#: Queries that are computed together where there are many, so that the logits of a long prompt stay bounded.
QUERIES = 256


def expanding_attention(
    q: Tensor, k: Tensor, v: Tensor, low: Tensor, up: Tensor, scaling: float, mask: Tensor | None = None
) -> Tensor:
    """Return the attention whose values are made whole first: what the other forms are held against.

    Parameters
    ----------
    q
        Queries ``(batch, heads, length, width)``.
    k, v
        Keys ``(batch, kv_heads, keys, width)`` and base values ``(batch, kv_heads, keys, value width)``.
    low
        Low-rank values ``(batch, keys, rank)``.
    up
        What makes values of them, with the adapter's scale: ``(kv_heads * value width, rank)``.
    scaling
        Factor of the logits.
    mask
        What is added to the logits, broadcast to ``(batch, heads, length, keys)``; None if query i of the last `length`
        positions sees all keys up to its own.
    """
    return _probabilities(q, k, scaling, mask) @ _each_head(_whole(v, low, up), q.shape[1])


def split_attention(
    q: Tensor, k: Tensor, v: Tensor, low: Tensor, up: Tensor, scaling: float, mask: Tensor | None = None
) -> Tensor:
    """Return the same as `expanding_attention`, ``(batch, heads, length, value width)``.

    Few queries take the reordered form; for at least as many as a head is wide, values are made whole once. Causal
    attention on a GPU is one kernel.
    """
    if q.is_cuda and mask is None and not torch.is_grad_enabled():
        from lorry.kernels.triton_split import triton_split_attention

        return triton_split_attention(q, k, v, low, up, scaling)
    length, keys = q.shape[2], k.shape[2]
    form: _Form = _reordered
    if length >= k.shape[-1]:  # so many queries share the values that making them whole once is the lesser work
        v = _whole(v, low, up)
        form = _fused
    if length <= QUERIES:
        return form(q, k, v, low, up, scaling, mask)
    found = []
    for start in range(0, length, QUERIES):
        stop = min(start + QUERIES, length)
        if mask is not None:
            part = mask if mask.shape[-2] == 1 else mask[..., start:stop, :]
            found.append(form(q[:, :, start:stop], k, v, low, up, scaling, part))
        else:  # what these queries see at most
            seen = keys - length + stop
            parts = (k[:, :, :seen], v[:, :, :seen], low[:, :seen])
            found.append(form(q[:, :, start:stop], *parts, up, scaling, None))
    return torch.cat(found, dim=2)


def tiled_split_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    low: Tensor,
    up: Tensor,
    scaling: float,
    queries: int = 16,
    keys: int = 16,
) -> Tensor:
    """Return the same for causal attention by an online softmax over tiles, as a GPU kernel does it.

    Parameters
    ----------
    q, k, v, low, up, scaling
        As in `expanding_attention`.
    queries, keys
        Sizes of a tile.
    """
    heads, length, total = q.shape[1], q.shape[2], k.shape[2]
    k, v = _each_head(k, heads), _each_head(v, heads)
    ups = _each_head(up.view(1, -1, v.shape[-1], up.shape[-1]), heads)  # (1, heads, value width, rank)
    output = q.new_zeros(*q.shape[:3], v.shape[-1])
    for first in range(0, length, queries):
        block = q[:, :, first : first + queries]
        position = torch.arange(first, first + block.shape[2], device=q.device)[:, None] + (total - length)
        top = block.new_full((*block.shape[:3], 1), float("-inf"))
        norm, base = torch.zeros_like(top), block.new_zeros(*block.shape[:3], v.shape[-1])
        small = block.new_zeros(*block.shape[:3], low.shape[-1])
        for start in range(0, int(position.max()) + 1, keys):
            part = slice(start, start + keys)
            logits = block @ k[:, :, part].transpose(-1, -2) * scaling
            column = torch.arange(start, start + logits.shape[-1], device=q.device)
            logits = logits.masked_fill(column > position, float("-inf"))
            higher = torch.maximum(top, logits.amax(-1, keepdim=True))
            keep, share = (top - higher).exp(), (logits - higher).exp()
            norm = norm * keep + share.sum(-1, keepdim=True)
            base = base * keep + share @ v[:, :, part]
            small = small * keep + share @ low[:, None, part]
            top = higher
        output[:, :, first : first + queries] = (base + small @ ups.transpose(-1, -2)) / norm
    return output


def _fused(q: Tensor, k: Tensor, v: Tensor, _: Tensor, __: Tensor, scaling: float, mask: Tensor | None) -> Tensor:
    """Attend over values that are whole by torch's own kernel."""
    heads, length, keys = q.shape[1], q.shape[2], k.shape[2]
    if mask is None and length < keys:
        mask = torch.ones(length, keys, dtype=torch.bool, device=q.device).tril(keys - length)
    causal = mask is None
    return F.scaled_dot_product_attention(
        q, _each_head(k, heads), _each_head(v, heads), attn_mask=mask, is_causal=causal, scale=scaling
    )


def _reordered(q: Tensor, k: Tensor, v: Tensor, low: Tensor, up: Tensor, scaling: float, mask: Tensor | None) -> Tensor:
    batch, heads, length, _ = q.shape
    kv_heads, width = v.shape[1], v.shape[-1]
    shares = _probabilities(q, k, scaling, mask)
    # queries of one group of heads side by side, so that keys and values are not repeated
    grouped = shares.reshape(batch, kv_heads, -1, shares.shape[-1])
    base = (grouped @ v).view(batch, heads, length, width)
    small = (shares.reshape(batch, heads * length, -1) @ low).view(batch, kv_heads, -1, low.shape[-1])
    update = small @ up.view(kv_heads, width, -1).transpose(-1, -2)
    return (
        base.add_(update.view(batch, heads, length, width)) if not base.requires_grad else base + update.view_as(base)
    )


def _whole(v: Tensor, low: Tensor, up: Tensor) -> Tensor:
    batch, kv_heads, keys, width = v.shape
    return v + (low @ up.T).view(batch, keys, kv_heads, width).transpose(1, 2)


def _probabilities(q: Tensor, k: Tensor, scaling: float, mask: Tensor | None) -> Tensor:
    batch, heads, length, width = q.shape
    kv_heads, keys = k.shape[1], k.shape[2]
    logits = (q.reshape(batch, kv_heads, -1, width) @ k.transpose(-1, -2)).view(batch, heads, length, keys) * scaling
    if mask is not None:
        logits = logits + mask
    elif length > 1:
        seen = torch.ones(length, keys, dtype=torch.bool, device=q.device).tril(keys - length)
        logits = logits.masked_fill(~seen, float("-inf"))
    return logits.softmax(-1, dtype=torch.promote_types(q.dtype, torch.float32)).to(q.dtype)


def _each_head(tensor: Tensor, heads: int) -> Tensor:
    times = heads // tensor.shape[1]
    return tensor if times == 1 else tensor.repeat_interleave(times, dim=1)
