"""A request under way: its tokens, its pages, and how far it has come."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

from torch import Tensor

from lorry.serving.paging.blocks import Block
from lorry.serving.request import Output, Request, TokenLogprob, Usage
from lorry.serving.sampling import Chooser, TextStream, Vocabulary
from lorry.serving.served import Resolved


class Sequence:
    """A request that waits or runs.

    Parameters
    ----------
    request
        What was asked for.
    resolved
        The versions of its adapters.
    vocabulary, tokenizer
        The model's.

    Attributes
    ----------
    tokens
        Of the prompt and of the answer so far.
    stored
        How many of them have their keys and values in pages.
    cached
        Tokens of the prompt that were found in the prefix cache.
    blocks
        Its pages.
    swapped
        What lay on its pages when it had to give them back; None if it was to be computed again, or never had to.
    cancelled
        Whether its client is gone.
    """

    def __init__(self, request: Request, resolved: Resolved, vocabulary: Vocabulary, tokenizer: Any) -> None:
        self.request = request
        self.resolved = resolved
        self.tokens = list(request.prompt)
        self.stored = 0
        self.cached = 0
        self.blocks: list[Block] = []
        self.swapped: Tensor | None = None
        self.cancelled = False
        self.chooser = Chooser(request, vocabulary)
        sampling = request.sampling
        self._stream = (
            None if tokenizer is None else TextStream(tokenizer, sampling.stop, min_tokens=sampling.min_tokens)
        )
        #: Log-probabilities of the prompt's tokens as far as they are known, where asked for; the first has none.
        self.prompt_logprobs: list[TokenLogprob | None] | None = None if sampling.prompt_logprobs is None else [None]
        #: What its pages belong to: versions and weights.
        self.root: Hashable = tuple((version.serial, weight) for version, weight in resolved)
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

    @property
    def reads_prompt(self) -> bool:
        """Whether the logits of all tokens of the prompt are needed that are still to be computed."""
        known = self.prompt_logprobs
        return known is not None and len(known) < len(self.request.prompt)

    def chosen(self, found: TokenLogprob) -> Output:
        """Add the token that was chosen to the answer, and return what that makes known."""
        chooser, sampling = self.chooser, self.request.sampling
        if chooser.finish == "error":
            return Output(self.request.id, finish="error", usage=self.usage, error=chooser.error)
        self.tokens.append(found.token)
        finish, text = chooser.finish, ""
        stop: str | int | None = chooser.stop
        if self._stream is not None:
            ended = finish == "stop" and found.token in chooser.ends
            text = "" if ended else self._stream.push((found.token,))
            text += self._stream.finish() if finish is not None else ""
            if self._stream.stopped is not None:
                finish, stop = "stop", self._stream.stopped
        first = self.answered == 1 and self.prompt_logprobs is not None
        return Output(
            self.request.id,
            (found.token,),
            text,
            (found,) if sampling.logprobs is not None else (),
            tuple(self.prompt_logprobs or ()) if first else None,
            finish,
            stop,
            self.usage,
        )
