"""What one request remembers from token to token."""

from __future__ import annotations

import secrets
from typing import Any, Literal

import torch
from torch import Tensor

from lorry.serving.request import Request

from .vocabulary import Vocabulary

_MASK = (1 << 64) - 1


class Chooser:
    """The tokens of one request so far, what follows from them for the next one, and whether they are at their end.

    It outlives a preemption: the tokens that were chosen stay chosen.

    Parameters
    ----------
    request
        What is asked for; its options were checked by `check_sampling`.
    vocabulary
        The model's.

    Attributes
    ----------
    tokens
        The answer so far, its end included.
    finish
        ``stop`` after a stop token or the end of the model or the grammar, ``length`` at the limit of tokens,
        ``error`` when no token of the model goes on with the grammar; else None. Stop texts are `TextStream`'s.
    error
        What happened, with ``error``.
    stop
        The stop token that ended it, if it was one of the request's own.
    seed
        The request's, or one that was drawn.
    plain
        Whether the next token depends on the logits and the temperature alone.
    """

    def __init__(self, request: Request, vocabulary: Vocabulary) -> None:
        sampling = request.sampling
        self.sampling = sampling
        self.tokens: list[int] = []
        self.finish: Literal["stop", "length", "error"] | None = None
        self.error: str | None = None
        self.stop: int | None = None
        self.seed = secrets.randbits(63) if sampling.seed is None else sampling.seed
        own = set(sampling.stop_tokens)
        self.ends = frozenset(own if sampling.ignore_end else own.union(vocabulary.ends))
        self.wordless = vocabulary.wordless
        self.matcher: Any = None if sampling.grammar is None else vocabulary.matcher(sampling.grammar)
        self.repeating = sampling.repetition_penalty != 1.0
        self.counting = sampling.presence_penalty != 0.0 or sampling.frequency_penalty != 0.0
        self.plain = not (self.repeating or self.counting or sampling.bias or self.matcher)
        self.greedy = sampling.temperature == 0
        self.seen = _Counts(request.prompt if self.repeating else ())
        self.answered = _Counts(())
        self.bias = (
            torch.tensor(list(sampling.bias), dtype=torch.long),
            torch.tensor(list(sampling.bias.values()), dtype=torch.float32),
        )

    @property
    def banned(self) -> frozenset[int]:
        """The tokens that must not come next, since the answer is shorter than asked for."""
        return self.ends if len(self.tokens) < self.sampling.min_tokens else frozenset()

    @property
    def key(self) -> int:
        """What the next draw depends on: 64 bits, signed, of the seed and the position."""
        mixed = _mix((_mix(self.seed & _MASK) + len(self.tokens)) & _MASK)
        return mixed - (1 << 64) if mixed >> 63 else mixed

    def take(self, token: int) -> None:
        """Remember a token that was chosen, and whether it ends the answer."""
        self.tokens.append(token)
        if self.repeating:
            self.seen.add(token)
        if self.counting:
            self.answered.add(token)
        if self.matcher is not None and not self.matcher.accept_token(token):
            self.fail(f"The grammar of this request does not allow token {token}, which was given to it.")
            return
        ended = self.matcher is not None and self.matcher.is_terminated()
        if ended or token in self.ends:
            self.finish = "stop"
            self.stop = token if token in self.sampling.stop_tokens else None
        elif len(self.tokens) >= self.sampling.max_tokens:
            self.finish = "length"

    def fail(self, why: str) -> None:
        """End the answer for a reason that the request or the model brought with it."""
        self.finish, self.error = "error", why


class _Counts:
    """How often which tokens occurred, as tensors that grow, so that a step costs nothing that depends on their number.

    Attributes
    ----------
    number
        How many different tokens there are.
    """

    def __init__(self, tokens: tuple[int, ...]) -> None:
        known, counts = torch.unique(torch.tensor(tokens, dtype=torch.long), return_counts=True)
        self.number = len(known)
        self._tokens, self._counts = known, counts.float()
        self._places = {token: place for place, token in enumerate(known.tolist())}

    def add(self, token: int) -> None:
        """Count a token once more."""
        place = self._places.setdefault(token, self.number)
        if place == self.number:
            if place == len(self._tokens):
                room = max(16, place)
                self._tokens = torch.cat([self._tokens, self._tokens.new_zeros(room)])
                self._counts = torch.cat([self._counts, self._counts.new_zeros(room)])
            self._tokens[place] = token
            self.number += 1
        self._counts[place] += 1

    @property
    def tokens(self) -> Tensor:
        """The tokens that occurred: (number,) int64, on the CPU."""
        return self._tokens[: self.number]

    @property
    def counts(self) -> Tensor:
        """How often each of them did: (number,) float32."""
        return self._counts[: self.number]


def _mix(x: int) -> int:
    """Return 64 bits of which each depends on all of x (the finaliser of splitmix64)."""
    x = (x + 0x9E3779B97F4A7C15) & _MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)
