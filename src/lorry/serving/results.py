"""What an engine tells of its requests, its adapters and itself, beside the outputs of its steps."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from lorry.serving.request import Output


@dataclass(frozen=True)
class Completed(Output):
    """All outputs of one request together."""

    @classmethod
    def of(cls, outputs: Iterable[Output]) -> Completed:
        """Return what outputs of one request, in their order, amount to."""
        each = list(outputs)
        last = each[-1]
        prompt = next((o.prompt_logprobs for o in each if o.prompt_logprobs is not None), None)
        return cls(
            last.id,
            tuple(token for o in each for token in o.tokens),
            "".join(o.text for o in each),
            tuple(found for o in each for found in o.logprobs),
            prompt,
            last.finish,
            last.stop,
            last.usage,
            last.error,
        )


@dataclass(frozen=True)
class Served:
    """An adapter that requests may name.

    Attributes
    ----------
    name
        Under which requests name it.
    version
        Counts from 1 with each load under the name.
    path
        Where it came from, if it is a file.
    rank
        Greatest rank of its sites; 0 if its method has none.
    bytes
        Of its tensors.
    place
        Where the nearest copy of these lies: ``pool``, ``host`` or ``disk``.
    in_use
        Requests under way that use it, of this version.
    pinned
        Whether it never leaves the pool.
    """

    name: str
    version: int
    path: Path | None
    rank: int
    bytes: int
    place: str
    in_use: int
    pinned: bool


@dataclass(frozen=True)
class Stats:
    """What an engine holds and has done.

    Attributes
    ----------
    running, waiting
        Requests that are computed, and that wait for their turn.
    pages, pages_free, pages_kept, pages_adapters
        Of the pool: all for keys and values; those that they could take now, after what is not in use has made room;
        those that the prefix cache keeps; and those with adapters.
    adapters
        Place (``pool``, ``host``, ``disk``) -> number of adapters that lie there.
    tokens_prefilled, tokens_cached, tokens_decoded
        Tokens of prompts that were computed, that were found in the prefix cache, and tokens that were generated.
    prefix_hits, prefix_misses
        Requests whose prompt began with known pages, and those whose did not.
    preemptions
        How often a running request had to give its pages back.
    steps
        Steps that computed something.
    finished
        Requests that ended, however they did.
    """

    running: int
    waiting: int
    pages: int
    pages_free: int
    pages_kept: int
    pages_adapters: int
    adapters: dict[str, int]
    tokens_prefilled: int
    tokens_cached: int
    tokens_decoded: int
    prefix_hits: int
    prefix_misses: int
    preemptions: int
    steps: int
    finished: int
