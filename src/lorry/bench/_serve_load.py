"""What is asked of a service in one go, and an engine with adapters of mixed ranks that answers it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

import lorry
from lorry.bench._crowd import off_zero
from lorry.bench._measure import llama
from lorry.serving.engine import Engine
from lorry.serving.options import EngineOptions
from lorry.serving.request import Request, Sampling
from lorry.serving.results import Completed

VOCABULARY = 512


@dataclass(frozen=True)
class Shape:
    """The base and what is asked of it.

    Attributes
    ----------
    layers, hidden, inner
        Of the Llama.
    ranks
        Of its adapters, going round.
    requests
        How many come at once.
    inputs, answers
        Least and most tokens of prompts and of answers; each is drawn evenly.
    batch
        Requests that are computed together, at most.
    """

    layers: int
    hidden: int
    inner: int
    ranks: tuple[int, ...]
    requests: int
    inputs: tuple[int, int]
    answers: tuple[int, int]
    batch: int

    def base(self) -> nn.Module:
        """Return the Llama, which never ends an answer by itself."""
        model = llama(self.layers, self.hidden, self.inner, VOCABULARY, eos_token_id=None, bos_token_id=None)
        return model.eval().requires_grad_(False)

    def rank(self, adapter: int) -> int:
        """Return an adapter's rank."""
        return self.ranks[adapter % len(self.ranks)]

    @property
    def most_tokens(self) -> int:
        """Tokens that a batch holds, at most."""
        return self.batch * (self.inputs[1] + self.answers[1] + 16)


@dataclass(frozen=True)
class Asked:
    """A request: its tokens, how many it asks for, and the number of its adapter, -1 for the base."""

    prompt: tuple[int, ...]
    answer: int
    adapter: int


def asked(shape: Shape, adapters: int, seed: int) -> list[Asked]:
    """Return requests; of one seed, they are the same but for their adapters, whatever there are of these."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(least: int, most: int) -> int:
        return int(torch.randint(least, most + 1, (), generator=generator))

    found = []
    for _ in range(shape.requests):
        length, answer, place = drawn(*shape.inputs), drawn(*shape.answers), drawn(0, (1 << 40) - 1)
        prompt = torch.randint(0, VOCABULARY, (length,), generator=generator).tolist()
        found.append(Asked(tuple(prompt), answer, place * adapters >> 40 if adapters else -1))
    return found


class Served:
    """An engine with so many adapters, which answers the load of one seed after another.

    Parameters
    ----------
    shape
        The base and the load.
    adapters
        How many there are.
    options
        The engine's, beside what the shape says.
    """

    def __init__(self, shape: Shape, adapters: int, **options: Any) -> None:
        self.shape, self.adapters = shape, adapters
        model = shape.base()
        for number in range(adapters):
            adapter = lorry.attach(
                model, {"method": "lora", "rank": shape.rank(number)}, name=f"a{number}", seed=number, activate=False
            )
            off_zero(adapter.parameters(), number)
            adapter.train(False)
        self.engine = Engine(model, None, EngineOptions(max_running=shape.batch, **options))
        self._calls = 0

    def __call__(self) -> None:
        """Answer the next load."""
        self._calls += 1
        self.answer(asked(self.shape, self.adapters, self._calls))

    def requests(self, load: Sequence[Asked]) -> list[Request]:
        """Return a load as the engine takes it."""
        return [
            Request(str(place), each.prompt, {f"a{each.adapter}": 1.0} if each.adapter >= 0 else {},
                    Sampling(max_tokens=each.answer))
            for place, each in enumerate(load)
        ]  # fmt: skip

    def answer(self, load: Sequence[Asked]) -> list[Completed]:
        """Answer a load and return the answers."""
        return self.engine.generate(self.requests(load))
