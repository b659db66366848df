"""Dropout whose mask is drawn again from a seed instead of being kept.

A mask costs as much memory as the activation in one byte each, and drawing Bernoulli numbers costs more than the
low-rank products that follow. Here each token (the last dimension of x) takes a random window of a fixed pool of 2^20
true Bernoulli draws: exact marginals, independent within a token, and two tokens share a stretch of the pool with
probability 2·width/2^20.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

_POOL_SIZE = 1 << 20
_POOL_SEED = 0x10AA


@lru_cache(maxsize=32)
def _pool(p: float, device: torch.device) -> Tensor:
    """Return the pool of keep flags (0 or 1, one byte each) for drop probability `p`."""
    return _draw((_POOL_SIZE,), p, _POOL_SEED).to(device)


def _draw(shape: tuple[int, ...], p: float, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.empty(shape).bernoulli_(1.0 - p, generator=generator).to(torch.uint8)


def keep_mask(shape: torch.Size | tuple[int, ...], p: float, seed: int, device: torch.device) -> Tensor:
    """Return a mask of `shape` in bytes, 1 with probability 1 - p and else 0.

    Offsets are drawn position by position, so a row's mask does not change when the batch is padded to a greater
    length.
    """
    *outer, width = shape
    if width > _POOL_SIZE // 2:
        return _draw(tuple(shape), p, seed).to(device)
    rows, positions = (outer[0], math.prod(outer[1:])) if outer else (1, 1)
    offsets = _offsets(rows, positions, width, seed)
    return _pool(p, device).unfold(0, width, 1).index_select(0, offsets.to(device)).view(tuple(shape))


def windows(
    shape: torch.Size, p: float, parts: Sequence[tuple[slice | Tensor | None, int]], device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return the pool and each token's offset into it, for parts of a batch with a seed each, part after part.

    The same masks as `keep_mask` gives for each part alone, for kernels that read the pool themselves.
    """
    rows, *inner, width = shape
    positions = math.prod(inner)
    offsets = []
    for part, seed in parts:
        count = rows if part is None else part.stop - part.start if isinstance(part, slice) else len(part)
        offsets.append(_offsets(count, positions, width, seed))
    return _pool(p, device), torch.cat(offsets).to(device, torch.int32)


def _offsets(rows: int, positions: int, width: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, _POOL_SIZE - width, (positions, rows), generator=generator).t().reshape(-1)


def kept_scale(p: float) -> float:
    """Return the factor that keeps the expectation: 1/(1-p), and 0 where everything is dropped."""
    return 0.0 if p >= 1.0 else 1.0 / (1.0 - p)


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float, seed: int, tile: int) -> Tensor:
        ctx.p, ctx.seed, ctx.tile = p, seed, tile
        return masked(x, p, seed, tile)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        return masked(grads[0], ctx.p, ctx.seed, ctx.tile), None, None, None


def masked(x: Tensor, p: float, seed: int, tile: int = 1) -> Tensor:
    """Return ``x · mask / (1 - p)`` for the mask of `seed`; p = 1 gives zeros.

    With `tile`, x holds the same rows so many times one after another, and each time the mask is the same.
    """
    if tile == 1:
        return (x * keep_mask(x.shape, p, seed, x.device)).mul_(kept_scale(p))
    each = x.unflatten(0, (tile, -1))
    return (each * keep_mask(each.shape[1:], p, seed, x.device)).mul_(kept_scale(p)).view_as(x)


def dropout(x: Tensor, p: float, seed: int, tile: int = 1) -> Tensor:
    """Drop elements of x with probability `p` and scale the others by 1/(1-p); keeps no mask for the backward pass.

    With `tile`, x holds the same rows so many times one after another, and each time the same elements drop.
    """
    if p <= 0.0:
        return x
    if torch.compiler.is_compiling():
        return torch.nn.functional.dropout(x, p)
    result: Tensor = _Dropout.apply(x, p, seed, tile)  # type: ignore[no-untyped-call]
    return result
