"""How one data set is dealt out to clients: evenly, by label or by size; a registry of functions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Generator, Tensor

from lorry.core.errors import OptionError
from lorry.core.registry import Registry

#: Makes a list of positions for each client from the labels of all examples, the number of clients and a generator.
SplitFn = Callable[..., list[list[int]]]
SPLITS: Registry[SplitFn] = Registry("split")


def register_split(name: str) -> Callable[[SplitFn], SplitFn]:
    """Return a decorator that registers a way to deal examples out."""
    return lambda function: SPLITS.add(name, function)


def deal(split: str | Mapping[str, Any], labels: Sequence[Any], clients: int, seed: int) -> list[list[int]]:
    """Deal examples out to clients.

    Parameters
    ----------
    split
        A name of `SPLITS`, or ``{split: name, **options}``.
    labels
        The label of each example; any value that can be compared.
    clients
        How many parts.
    seed
        Of the draws.

    Returns
    -------
    list
        The positions of each client's examples, ascending; every example is in exactly one part.

    Raises
    ------
    OptionError
        An unknown split or option, or a client that would get nothing.
    """
    options = {"split": split} if isinstance(split, str) else dict(split)
    function = SPLITS.find(str(options.pop("split", options.pop("name", ""))))
    options.pop("column", None)  # where the labels were read
    if len(labels) < clients:
        raise OptionError(f"{len(labels)} examples cannot be dealt out to {clients} clients; use fewer clients.")
    try:
        parts = function(list(labels), clients, torch.Generator().manual_seed(seed), **options)
    except TypeError as error:
        raise OptionError(f"The split {split!r} does not take these options: {error}.") from error
    empty = [i for i, part in enumerate(parts) if not part]
    if empty:
        raise OptionError(
            f"The split {split!r} leaves client {empty[0]} of {clients} without examples; use a larger alpha, fewer "
            "clients or another seed."
        )
    return [sorted(part) for part in parts]


@register_split("even")
def even(labels: list[Any], clients: int, generator: Generator) -> list[list[int]]:
    """Deal out in random order, the same number to each."""
    order = torch.randperm(len(labels), generator=generator).tolist()
    return [order[i::clients] for i in range(clients)]


@register_split("dirichlet")
def dirichlet(labels: list[Any], clients: int, generator: Generator, alpha: float = 0.5) -> list[list[int]]:
    """Deal each label out in shares drawn from Dirichlet(alpha): the smaller alpha, the more the clients differ."""
    parts: list[list[int]] = [[] for _ in range(clients)]
    for label in sorted(set(labels), key=str):
        own = [i for i, found in enumerate(labels) if found == label]
        own = [own[i] for i in torch.randperm(len(own), generator=generator).tolist()]
        for part, piece in zip(parts, _cut(own, _drawn(clients, alpha, generator)), strict=True):
            part += piece
    return parts


@register_split("dominant")
def dominant(labels: list[Any], clients: int, generator: Generator, share: float = 0.9) -> list[list[int]]:
    """Give each label's examples to one client but for a rest that the others have in equal parts (90/5/5 of three)."""
    if not 0 < share <= 1:
        raise OptionError(f"The split 'dominant' needs a share above 0 and at most 1, found {share}.")
    parts: list[list[int]] = [[] for _ in range(clients)]
    rest = (1 - share) / max(clients - 1, 1)
    for number, label in enumerate(sorted(set(labels), key=str)):
        own = [i for i, found in enumerate(labels) if found == label]
        own = [own[i] for i in torch.randperm(len(own), generator=generator).tolist()]
        shares = torch.full((clients,), rest, dtype=torch.float64)
        shares[number % clients] = share if clients > 1 else 1.0
        for part, piece in zip(parts, _cut(own, shares), strict=True):
            part += piece
    return parts


@register_split("size")
def size(labels: list[Any], clients: int, generator: Generator, alpha: float = 0.5) -> list[list[int]]:
    """Deal out in random order, the numbers drawn from Dirichlet(alpha); each client gets at least one example."""
    order = torch.randperm(len(labels), generator=generator).tolist()
    first, others = order[:clients], order[clients:]
    pieces = _cut(others, _drawn(clients, alpha, generator))
    return [[one, *piece] for one, piece in zip(first, pieces, strict=True)]


def _drawn(clients: int, alpha: float, generator: Generator) -> Tensor:
    """Return shares drawn from a symmetric Dirichlet distribution, ``(clients,)`` in float64."""
    if not alpha > 0:
        raise OptionError(f"A split by Dirichlet needs an alpha above 0, found {alpha}.")
    drawn = torch._standard_gamma(torch.full((clients,), float(alpha), dtype=torch.float64), generator=generator)
    total = drawn.sum()
    return drawn / total if total > 0 else torch.full_like(drawn, 1 / clients)


def _cut(items: list[int], shares: Tensor) -> list[list[int]]:
    """Cut a list into consecutive pieces of these shares, rounded so that nothing is lost."""
    ends = [0, *(shares.cumsum(0) * len(items)).round().long().clamp(0, len(items)).tolist()]
    ends[-1] = len(items)
    return [items[a:b] for a, b in zip(ends, ends[1:], strict=False)]
