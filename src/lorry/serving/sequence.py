"""A request under way: its tokens, its pages, and how far it has come."""

from __future__ import annotations

from collections.abc import Hashable

from lorry.serving.paging.blocks import Block
from lorry.serving.request import Request, Usage
from lorry.serving.served import Resolved


class Sequence:
    """A request that waits or runs.

    Attributes
    ----------
    request
        What was asked for.
    resolved
        The versions of its adapters.
    tokens
        Of the prompt and of the answer so far.
    stored
        How many of them have their keys and values in pages.
    cached
        Tokens of the prompt that were found in the prefix cache.
    blocks
        Its pages.
    cancelled
        Whether its client is gone.
    """

    def __init__(self, request: Request, resolved: Resolved) -> None:
        self.request = request
        self.resolved = resolved
        self.tokens = list(request.prompt)
        self.stored = 0
        self.cached = 0
        self.blocks: list[Block] = []
        self.cancelled = False
        #: What its pages belong to: versions and weights.
        self.root: Hashable = tuple((version.serial, weight) for version, weight in resolved)
        #: The composition by names on the model, None for the bare base.
        self.composition = {v.adapter.name: weight for v, weight in resolved} or None
        self.residents = [version.resident for version, _ in resolved]
        #: Whether its tokens may lie in one batch with those of other compositions.
        self.by_token = all(version.by_token for version, _ in resolved)

    @property
    def answered(self) -> int:
        """Tokens of the answer so far."""
        return len(self.tokens) - len(self.request.prompt)

    @property
    def left(self) -> int:
        """Tokens that are still to be generated, at most."""
        return self.request.sampling.max_tokens - self.answered

    @property
    def missing(self) -> int:
        """Tokens whose keys and values are still to be computed."""
        return len(self.tokens) - self.stored

    @property
    def usage(self) -> Usage:
        """Tokens so far."""
        return Usage(len(self.request.prompt), self.cached, self.answered)
