"""What dynamics have merged of an adapter: a frozen part of the same factors, so that the base stays as it is.

``scale · B A`` with ``A = [trained; merged]`` and ``B = [trained, merged]`` is one plain low-rank update of more rank:
it saves, loads and fuses like any, and any number of such adapters share a base. The merged rows of A and columns of B
get no gradient, and are put back after each step, whatever an optimizer does to what has none (weight decay).
"""

from __future__ import annotations

import torch
from torch import Tensor

from lorry.core.errors import SiteError

from .groups import Resize
from .hooks import Moment
from .low_rank import Pair, pairs_of

#: Why two dynamics that merge cannot act on one job, nor one beside what needs factors that are wholly trained.
ONE_ALONE = "each keeps a merged part of its own in the same tensors"


def merging_pairs(at: Moment) -> list[Pair]:
    """Return the pairs of the adapter.

    Raises
    ------
    SiteError
        A method whose rank and scale cannot be set apart.
    """
    found = pairs_of(at.adapter, at.name, own=True)
    for pair in found:
        if not {"rank", "alpha"} <= pair.entry.method.to_dict().keys():
            raise SiteError(
                f"The dynamic '{at.name}' gives '{pair.path}' more rank at the same scale, which the method "
                f"{pair.entry.method.info.slug} has no options for (rank and alpha)."
            )
    return found


def trained_rank(at: Moment, pair: Pair) -> int:
    """Return how many rows of A are trained; the first ones."""
    known = at.state.get(f"{pair.path}/rank")
    return len(pair.a) if known is None else int(known)


def put(at: Moment, pair: Pair, a: Tensor, b: Tensor, rank: int, resize: Resize | None = None) -> None:
    """Put factors in the place of a pair's, of which the first `rank` units are trained."""
    at.state[f"{pair.path}/rank"] = torch.tensor(rank)
    if a.shape == pair.a.shape and resize is None:
        pair.a.copy_(a)
        pair.b.copy_(b)
        return
    one = pair.entry.method.with_options(rank=len(a), alpha=1.0)
    method = one.with_options(alpha=pair.scale / one.scale(pair.entry.site))  # type: ignore[attr-defined]
    own = dict(pair.entry.home.tensors())
    at.groups.replace(pair.path, method, {**own, "A": a, "B": b}, resize)


def dense_part(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Return factors of the same product whose rank is at most the layer's smaller width."""
    if len(a) <= min(a.shape[1], len(b)):
        return a, b
    exact = torch.promote_types(a.dtype, torch.float32)
    product = (b.to(exact) @ a.to(exact)).to(a)
    if a.shape[1] <= len(b):
        return torch.eye(a.shape[1], dtype=a.dtype, device=a.device), product
    return product, torch.eye(len(b), dtype=a.dtype, device=a.device)


def hold(at: Moment) -> None:
    """Take the gradient of what is merged away; before gradients are clipped."""
    gradients = at.groups.gradients()
    for pair in pairs_of(at.adapter, at.name, own=True):
        rank = trained_rank(at, pair)
        for key, part in (("A", (slice(rank, None), slice(None))), ("B", (slice(None), slice(rank, None)))):
            gradient = gradients.get(f"{pair.path}.{key}")
            if gradient is not None:
                gradient[part] = 0.0


def remember(at: Moment) -> None:
    """Keep what is merged, just before the optimizer's step."""
    for pair in pairs_of(at.adapter, at.name, own=True):
        rank = trained_rank(at, pair)
        if rank < len(pair.a):
            at.state[f"{pair.path}/a"], at.state[f"{pair.path}/b"] = pair.a[rank:].clone(), pair.b[:, rank:].clone()


def put_back(at: Moment) -> None:
    """Put what is merged back after the step."""
    for pair in pairs_of(at.adapter, at.name, own=True):
        rank = trained_rank(at, pair)
        if f"{pair.path}/a" in at.state:
            pair.a[rank:] = at.state.pop(f"{pair.path}/a")
            pair.b[:, rank:] = at.state.pop(f"{pair.path}/b")
