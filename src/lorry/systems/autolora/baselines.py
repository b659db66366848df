"""What the retriever is held against: the same training on flattened weights, and the names of files."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from lorry.depot.encoder import Factors, Shapes, Stack, check_sites, stack
from lorry.depot.retriever import BagOfWords
from lorry.systems.autolora.pool import Concept

#: Names as people give them, that say nothing.
GENERIC = ("my_lora_final", "lora_v{n}", "style{n}", "test-{n}", "new_try_{n}", "pytorch_lora_weights")


class FlatEncoder(nn.Module):
    """All factors of an adapter as one vector, and a network of two layers on it.

    Parameters
    ----------
    shapes
        The sites.
    rank
        Of the adapters; smaller ones are filled with zeros.
    out
        Width of the result.
    hidden
        Width between the layers.
    seed
        Of the start.
    """

    def __init__(self, shapes: Shapes, rank: int, out: int, hidden: int = 64, seed: int = 0) -> None:
        super().__init__()
        self.shapes = dict(shapes)
        width = sum(rank * (rows + columns) for rows, columns in shapes.values())
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.layers = nn.Sequential(
                nn.LayerNorm(width), nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, out)
            )

    def stacked(self, adapters: Sequence[Factors]) -> Stack:
        """Return adapters side by side."""
        for factors in adapters:
            check_sites(factors, self.shapes)
        return stack(adapters, self.shapes)

    def encode(self, stack: Stack) -> Tensor:
        """Return ``(adapters, 1, out)``."""
        flat = torch.cat([t.flatten(1) for pair in stack.values() for t in pair], 1)
        found: Tensor = self.layers(flat)
        return found.unsqueeze(1)


def names_of(concepts: Sequence[Concept], seed: int) -> list[str]:
    """Return names of files as users have them: a third says nothing, a third one word of the concept, and a third the
    words of the concept with one that is wrong, as names do that were copied from another adapter's.

    Parameters
    ----------
    concepts
        What the adapters do.
    seed
        Of what is drawn.
    """
    rng, found = random.Random(f"names {seed}"), []
    for number, concept in enumerate(concepts):
        words, kind = list(concept.words.values()), rng.randrange(3)
        if kind == 0:
            found.append(rng.choice(GENERIC).format(n=number))
        elif kind == 1:
            found.append(f"{rng.choice(words)}_v{rng.randint(1, 9)}")
        else:
            other = rng.choice(concepts)
            words[rng.randrange(len(words))] = rng.choice(list(other.words.values()))
            found.append("-".join(words))
    return found


def scores_of_names(queries: Sequence[str], names: Sequence[str]) -> Tensor:
    """Return the cosine of each query's words with the words of each name, ``(queries, names)``."""
    texts = [" ".join(name.replace("_", " ").replace("-", " ").split()) for name in names]
    words = BagOfWords.of([*queries, *texts])
    both = [nn.functional.normalize(words(each), dim=-1) for each in (list(queries), texts)]
    return both[0] @ both[1].mT


def regauged(factors: Factors, seed: int) -> Factors:
    """Return the same updates in factors of another gauge: ``(G⁻¹ A, B G)`` with a drawn G at each site."""
    g, found = torch.Generator().manual_seed(seed), {}
    for path, (a, b) in factors.items():
        rank = a.shape[0]
        # away from singular, so that rounding stays small
        left, _ = torch.linalg.qr(torch.randn(rank, rank, generator=g))
        right, _ = torch.linalg.qr(torch.randn(rank, rank, generator=g))
        sizes = torch.empty(rank).uniform_(0.5, 2.0, generator=g)
        gauge = left @ torch.diag(sizes) @ right
        found[path] = (torch.linalg.inv(gauge) @ a, b @ gauge)
    return found


def expected_recall(scores: Tensor, k: int = 1) -> float:
    """Return recall among the first k, in expectation over the order of candidates that tie.

    Parameters
    ----------
    scores
        ``(queries, candidates)``; the own candidate of a query has its number.
    k
        How many are looked at.
    """
    own = scores.diagonal().unsqueeze(1)
    close = (scores - own).abs() <= 1e-6
    better = ((scores > own) & ~close).sum(1).double()
    tied = close.sum(1).double()
    return float(((k - better) / tied).clamp(0, 1).mean())


def split(concepts: Mapping[str, Concept], share: float, seed: int) -> tuple[list[str], list[str]]:
    """Return names to learn from and names that are held out, of each family its share.

    Every word of a held-out concept is in one that is learned from, so that what is new are the combinations.
    """
    rng = random.Random(f"split {seed}")
    held: set[str] = set()
    for family in sorted({c.family for c in concepts.values()}):
        members = [name for name, concept in concepts.items() if concept.family == family]
        held |= set(rng.sample(members, round(share * len(members))))
    for name in sorted(held):
        known = {word for n, c in concepts.items() if n not in held for word in c.words.values()}
        if not set(concepts[name].words.values()) <= known:
            held.discard(name)
    return [name for name in concepts if name not in held], [name for name in concepts if name in held]
