"""What each block of a network does: another prompt in one block alone, and how far the pictures go towards it.

The prompt replacement by which B-LoRA found its blocks (arXiv 2403.14572, section 3). For each block, pictures are made
of one prompt while that block reads another one, from the same noise as those of either prompt alone. How far they went
is the projection ``<x - a, b - a> / <b - a, b - a>`` of pictures ``x`` between those of the first prompt ``a`` (0) and
of the second ``b`` (1), which all blocks together reach; a judge may measure something else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lorry.diffusion.errors import DiffusionError
from lorry.diffusion.families import family_of
from lorry.diffusion.making import sample
from lorry.diffusion.prompting import prompted, text_blocks

#: Pictures, those of the first prompt and those of the second -> one number.
Judge = Callable[[Tensor, Tensor, Tensor], float]


@dataclass(frozen=True)
class Probe:
    """What came out for one pair of prompts.

    Attributes
    ----------
    first, second
        The prompts.
    shares
        Block -> how far pictures go from the first towards the second prompt when that block alone reads it.
    """

    first: str
    second: str
    shares: dict[str, float]


def moved(pictures: Tensor, first: Tensor, second: Tensor) -> float:
    """Return how far pictures lie on the way from `first` to `second`, as the share of that way."""
    way = (second.double() - first.double()).flatten()
    length = float(way @ way)
    return float((pictures.double() - first.double()).flatten() @ way) / length if length else 0.0


def probe(
    pipeline: Any,
    pairs: Sequence[tuple[str, str]],
    *,
    blocks: Sequence[str] | None = None,
    seeds: Sequence[int] = (0, 1),
    judge: Judge = moved,
    callback: Callable[[int, int], None] | None = None,
    **settings: Any,
) -> list[Probe]:
    """Measure what each block does with each pair of prompts.

    Parameters
    ----------
    pipeline
        With a U-Net, whose blocks each read the text.
    pairs
        The prompt of the pictures, and the one that a block reads instead.
    blocks
        Those to try; all that read a text (`lorry.diffusion.text_blocks`) if not given.
    seeds
        Of the noise; a measure is over the pictures of all of them.
    judge
        What is measured; `moved` if not given.
    callback
        Called with the number of runs made and of all.
    settings
        As for `lorry.diffusion.sample`: steps, guidance, height, width, batch_size, compositions.

    Raises
    ------
    DiffusionError
        No pairs or seeds, or blocks that have no prompt of their own.
    """
    if not pairs or not seeds:
        raise DiffusionError("A probe needs at least one pair of prompts and one seed.")
    family = family_of(pipeline)
    network = family.network(pipeline)
    chosen = list(text_blocks(network) if blocks is None else blocks)
    total, done = len(pairs) * (len(chosen) + 2), 0
    asked = settings.get("guidance")
    guided = family.guided_together and (family.guidance if asked is None else asked) > 1
    found = []
    for first, second in pairs:
        made: dict[str | None, Tensor] = {}
        for name, prompt, block in ((None, first, None), ("", second, None), *((b, first, b) for b in chosen)):
            with _reading(pipeline, block, second, guided):
                made[name] = sample(pipeline, [prompt] * len(seeds), seeds=list(seeds), **settings).pixels
            done += 1
            if callback is not None:
                callback(done, total)
        found.append(Probe(first, second, {b: judge(made[b], made[None], made[""]) for b in chosen}))
    return found


@contextmanager
def _reading(pipeline: Any, block: str | None, prompt: str, guided: bool) -> Iterator[None]:
    """Let a block read a prompt wherever the network is told one; what it is told to keep away from stays."""
    if block is None:
        yield
        return
    family = family_of(pipeline)
    with torch.no_grad():
        text = family.encode(pipeline, [prompt])["text"]
    with prompted(family.network(pipeline), {block: text}, guided=guided):
        yield
