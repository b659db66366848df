"""Decompositions of weights and gradients, from which starts take their factors."""

from __future__ import annotations

import torch
from torch import Generator, Tensor


def truncated_svd(
    matrix: Tensor, rank: int, iterations: int, generator: Generator, oversampled: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the first singular triples of a matrix.

    Parameters
    ----------
    matrix
        ``(*lead, out, in)``.
    rank
        How many triples.
    iterations
        Subspace iterations of a randomised decomposition (Halko et al. 2011); 0 computes the exact one, and so does a
        bank of matrices, or a matrix that is not wider than the subspace.
    generator
        Its seed is that of the randomised decomposition.
    oversampled
        Dimensions of its subspace; `rank` if not given.

    Returns
    -------
    U ``(*lead, out, rank)``, S ``(*lead, rank)`` descending, Vᵀ ``(*lead, rank, in)``.
    """
    width = rank if oversampled is None else oversampled
    if iterations and matrix.ndim == 2 and width < min(matrix.shape):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(generator.initial_seed() % 2**63)
            u, s, v = torch.svd_lowrank(matrix, width, niter=iterations)
        vt = v.mT
    else:
        u, s, vt = torch.linalg.svd(matrix, full_matrices=False)
    return u[..., :rank], s[..., :rank], vt[..., :rank, :]


def split_evenly(u: Tensor, s: Tensor, vt: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Return A and B with ``scale · B A = U S Vᵀ``, the singular values split evenly between them."""
    root = (s / scale).sqrt()
    return root.unsqueeze(-1) * vt, u * root.unsqueeze(-2)
