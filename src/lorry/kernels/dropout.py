"""Dropout whose mask is drawn again from a seed instead of being kept.

A mask costs as much memory as the activation in one byte each, and drawing Bernoulli numbers costs more than the
low-rank products that follow. Here each token (the last dimension of x) takes a random window of a fixed pool of 2^20
true Bernoulli draws: exact marginals, independent within a token, and two tokens share a stretch of the pool with
probability 2·width/2^20. Where a token's window begins is a hash of seed, row and position, so every device, and a
kernel that works on a tile alone, finds the same mask, whatever else is in the batch.
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
_WORD = 0xFFFFFFFF
#: Shift and odd factor of each round of the hash, and by how much the counters of two rows' tokens differ.
_ROUNDS = ((16, 0x7FEB352D), (15, 0x846CA68B))
ROW_STEP = 0x9E3779B1

#: Integers as wide as the elements of a floating type.
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@lru_cache(maxsize=32)
def _pool(p: float, device: torch.device, kind: torch.dtype = torch.uint8, kept: int = 1) -> Tensor:
    """Return the pool of keep flags for drop probability `p` as integers of `kind`: `kept`, and 0 where dropped."""
    return (_draw((_POOL_SIZE,), p, _POOL_SEED).to(kind) * kept).to(device)


def _draw(shape: tuple[int, ...], p: float, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.empty(shape).bernoulli_(1.0 - p, generator=generator).to(torch.uint8)


def keep_mask(shape: torch.Size | tuple[int, ...], p: float, seed: int, device: torch.device) -> Tensor:
    """Return a mask of `shape` in bytes, 1 with probability 1 - p and else 0.

    A token's mask depends on its row, its position and the seed alone, so it does not change when the batch is padded
    to a greater length or has further rows.
    """
    return _flags(shape, p, seed, device, torch.uint8, 1)


def keep_bits(shape: torch.Size | tuple[int, ...], p: float, seed: int, like: Tensor) -> Tensor:
    """Return the mask that `keep_mask` gives as integers of the width of `like`'s type: all bits set where an element
    is kept, none where it is dropped.

    Dropping is then one bitwise operation, several times faster than a product with bytes, in half precision above
    all, where every product is computed in float32 and rounded.
    """
    kind = _INTEGERS[like.dtype.itemsize]
    return _flags(shape, p, seed, like.device, kind, 255 if kind == torch.uint8 else -1)


def drop_(x: Tensor, bits: Tensor) -> Tensor:
    """Drop elements of x in place, for bits of `keep_bits`, without the factor that keeps the expectation."""
    x.view(bits.dtype).bitwise_and_(bits)
    return x


def dropped_into(bits: Tensor, x: Tensor) -> Tensor:
    """Return x with elements dropped, without the factor that keeps the expectation, in the memory of the bits."""
    return bits.bitwise_and_(x.view(bits.dtype)).view(x.dtype)


def _flags(
    shape: torch.Size | tuple[int, ...], p: float, seed: int, device: torch.device, kind: torch.dtype, kept: int
) -> Tensor:
    *outer, width = shape
    if width > _POOL_SIZE // 2:
        return _draw(tuple(shape), p, seed).to(kind).mul_(kept).to(device)
    rows, positions = (outer[0], math.prod(outer[1:])) if outer else (1, 1)
    offsets = _offsets(rows, positions, width, seed, device)
    return _pool(p, device, kind, kept).unfold(0, width, 1).index_select(0, offsets).view(tuple(shape))


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
        offsets.append(_offsets(count, positions, width, seed, device))
    return _pool(p, device), torch.cat(offsets).to(torch.int32)


def pool(p: float, device: torch.device) -> Tensor:
    """Return the keep flags in bytes of which every token takes a window, for kernels that read them there."""
    return _pool(p, device)


def room(width: int) -> int:
    """Return how many places a window of `width` flags may begin at; below 1 the pool does not serve."""
    return _POOL_SIZE - width if width <= _POOL_SIZE // 2 else 0


def seed_key(seed: int) -> int:
    """Return a seed as the 32 bits from which the windows of its tokens are hashed."""
    key = (seed ^ seed >> 32 ^ 0x9E3779B9) & _WORD
    for shift, factor in _ROUNDS:
        key = (key ^ key >> shift) * factor & _WORD
    return key ^ key >> 16


@lru_cache(maxsize=16)
def _counters(rows: int, positions: int, device: torch.device) -> Tensor:
    row, position = (torch.arange(count, device=device) for count in (rows, positions))
    return (((row * ROW_STEP)[:, None] + position) & _WORD).view(-1)


def _offsets(rows: int, positions: int, width: int, seed: int, device: torch.device) -> Tensor:
    """Return where the window of each token begins, ``(rows · positions,)``.

    The counter of a token is hashed by two rounds of shifted exclusive-or and multiplication of 32 bits, each of which
    is a bijection; `lorry.kernels.triton_tiles` has the same function.
    """
    bits = _counters(rows, positions, device) ^ seed_key(seed)
    for shift, factor in _ROUNDS:
        bits.bitwise_xor_(bits >> shift).mul_(factor).bitwise_and_(_WORD)
    return bits.bitwise_xor_(bits >> 16).remainder_(room(width))


def kept_scale(p: float) -> float:
    """Return the factor that keeps the expectation: 1/(1-p), and 0 where everything is dropped."""
    return 0.0 if p >= 1.0 else 1.0 / (1.0 - p)


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float, seed: int, tile: int) -> Tensor:
        ctx.p, ctx.seed, ctx.tile = p, seed, tile
        return _dropped(x, p, seed, tile)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        # through the function again, so that a second derivative finds its way
        return dropout(grads[0], ctx.p, ctx.seed, ctx.tile), None, None, None


def _dropped(x: Tensor, p: float, seed: int, tile: int = 1) -> Tensor:
    """Return what `masked` does, with no graph."""
    each = x if tile == 1 else x.unflatten(0, (tile, -1))
    bits = keep_bits(x.shape if tile == 1 else each.shape[1:], p, seed, x)
    if tile > 1:
        bits = bits.expand(each.shape).contiguous()
    return dropped_into(bits, each).mul_(kept_scale(p)).view_as(x)


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
