"""Dense random projections of one vector to the entries of a site's matrices, drawn from a seed.

Both are isometries in expectation: over all sites together ``E Pᵀ P = I``.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Generator, Tensor

from lorry.core.method.spec import Init, Tensors, TensorSpec
from lorry.core.method.start import mix_seed


def _drawn(seed: int, fill: Callable[[Tensor, Generator], object]) -> Init:
    """Return an initialiser that draws from `seed`, whatever the adapter's own seed is."""
    return lambda tensor, _: fill(tensor, torch.Generator().manual_seed(seed))


def gaussian_specs(size: int, length: int, scale: float, seed: int, path: str, saved: bool) -> dict[str, TensorSpec]:
    """Return the tensor of a projection whose entries are independent and normal, ``(size, length)``."""

    def fill(tensor: Tensor, generator: Generator) -> None:
        tensor.normal_(0.0, scale, generator=generator)

    init = _drawn(mix_seed(seed, path, "gaussian"), fill)
    return {"projection": TensorSpec((size, length), init, trained=False, dtype=torch.float32, saved=saved)}


def fastfood_specs(size: int, length: int, scale: float, seed: int, path: str, saved: bool) -> dict[str, TensorSpec]:
    """Return the tensors of blocks ``S H G Π H B`` (Fastfood, Le et al. 2013), each ``(blocks, width)``.

    H is the orthonormal Hadamard matrix of the smallest power of two that is not below `length`; B has random signs, Π
    permutes, G is normal, and S gives each row the length that one of a Gaussian matrix has.
    """
    width = 1 << (length - 1).bit_length()
    blocks = -(-size // width)

    def signs(tensor: Tensor, generator: Generator) -> None:
        tensor.copy_(torch.randint(0, 2, tensor.shape, generator=generator) * 2 - 1)

    def order(tensor: Tensor, generator: Generator) -> None:
        for row in tensor:
            row.copy_(torch.randperm(width, generator=generator))

    def gauss(tensor: Tensor, generator: Generator) -> None:
        tensor.normal_(generator=generator)

    def lengths(tensor: Tensor, generator: Generator) -> None:
        # the norm of a normal vector of this width, over that of G, drawn as `gauss` draws it
        own = torch.empty(tensor.shape).normal_(generator=torch.Generator().manual_seed(mix_seed(seed, path, "gauss")))
        for row, g in zip(tensor, own, strict=True):
            degrees = torch.full((width,), width / 2)  # squared norms of normal vectors: a gamma distribution
            row.copy_((2 * torch._standard_gamma(degrees, generator=generator)).sqrt())
            row.mul_(scale * math.sqrt(width) / g.norm())

    parts: dict[str, tuple[Callable[[Tensor, Generator], object], torch.dtype]] = {
        "signs": (signs, torch.float32),
        "order": (order, torch.int64),
        "gauss": (gauss, torch.float32),
        "lengths": (lengths, torch.float32),
    }
    return {
        name: TensorSpec((blocks, width), _drawn(mix_seed(seed, path, name), fill), False, dtype, saved)
        for name, (fill, dtype) in parts.items()
    }


def gaussian(theta: Tensor, tensors: Tensors) -> Tensor:
    """Return the image ``(size,)`` of the vector."""
    return tensors["projection"] @ theta


def fastfood(theta: Tensor, tensors: Tensors, size: int) -> Tensor:
    """Return the image ``(size,)`` of the vector, without the matrix."""
    width = tensors["signs"].shape[-1]
    x = torch.nn.functional.pad(theta, (0, width - len(theta)))
    x = hadamard(x * tensors["signs"])
    x = x.gather(-1, tensors["order"])
    return (hadamard(x * tensors["gauss"]) * tensors["lengths"]).flatten()[:size]


def hadamard(x: Tensor) -> Tensor:
    """Return the orthonormal Walsh-Hadamard transform of the last dimension, whose width is a power of two."""
    width, step = x.shape[-1], 1
    while step < width:
        pairs = x.unflatten(-1, (-1, 2, step))
        left, right = pairs.unbind(-2)
        x = torch.stack([left + right, left - right], -2).flatten(-3)
        step *= 2
    return x / math.sqrt(width)
