"""Generators of inputs: what writes new prompts of a task after a few seeds."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import nn

from lorry.core.errors import OptionError
from lorry.core.life.api import adapters
from lorry.training.encode import tokenize
from lorry.training.reference import asking, continued

#: How an instruction model is asked for more of the same.
DEMONSTRATIONS = "Here are inputs of one task, one to a line.\n{seeds}\nWrite one more input of this task.\n"


@contextmanager
def quietly(model: nn.Module, adapter: str | None, count: int) -> Iterator[None]:
    """Ask a model about `count` rows, under one adapter or none; it need not carry any."""
    if adapters(model):
        with asking(model, adapter, count):
            yield
        return
    was = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was)


class Generator(Protocol):
    """Writes inputs; a function ``(seeds, count, seed) -> texts`` is one, too."""

    def __call__(self, seeds: Sequence[str], count: int, seed: int) -> list[str]:
        """Return at most `count` new inputs after the inputs of the seeds."""
        ...


@dataclass(frozen=True, eq=False)
class Prompted:
    """A language model that writes inputs, without any adapter.

    Attributes
    ----------
    model, tokenizer
        Any causal language model of transformers.
    style
        ``demonstrations`` shows all seeds in an order of its own each time and takes the next line, for models that
        follow instructions; ``openings`` begins with a part of one seed and lets the model go on, for those that do
        not.
    template
        Of the demonstrations, with {seeds}.
    end
        What ends an input and belongs to it, such as ``>``; empty takes what comes before the line's end.
    temperature
        Of the draws.
    max_new_tokens
        Most tokens of an input.
    batch
        Inputs written at once.
    """

    model: nn.Module
    tokenizer: Any
    style: Literal["demonstrations", "openings"] = "demonstrations"
    template: str = DEMONSTRATIONS
    end: str = ""
    temperature: float = 0.9
    max_new_tokens: int = 64
    batch: int = 64

    def __post_init__(self) -> None:
        """Refuse a style that there is not, and a template without a place for the seeds."""
        if self.style not in ("demonstrations", "openings"):
            raise OptionError(f"The style of a generator is demonstrations or openings, found {self.style!r}.")
        if "{seeds}" not in self.template:
            raise OptionError(f"The template must hold {{seeds}}, found {self.template!r}.")

    def __call__(self, seeds: Sequence[str], count: int, seed: int) -> list[str]:
        """Return what the model writes; texts without the end, and empty ones, are left out."""
        draw, generator = random.Random(seed), torch.Generator().manual_seed(seed)
        found: list[str] = []
        for start in range(0, count, self.batch):
            begun = [self._begun(seeds, draw) for _ in range(min(self.batch, count - start))]
            with quietly(self.model, None, len(begun)):
                made = continued(
                    self.model,
                    self.tokenizer,
                    [context for context, _ in begun],
                    generator=generator,
                    max_new_tokens=self.max_new_tokens,
                    temperature=self.temperature,
                )
            texts = self.tokenizer.batch_decode([new.tolist() for _, new in made], skip_special_tokens=True)
            found += [self._cut(opening + text) for (_, opening), text in zip(begun, texts, strict=True)]
        return [text for text in found if text]

    def _begun(self, seeds: Sequence[str], draw: random.Random) -> tuple[str, str]:
        """Return what the model is shown, and which part of it belongs to the input."""
        if self.style == "openings":
            seed = draw.choice(list(seeds))
            inside = seed.removesuffix(self.end) if self.end else seed
            tokens = tokenize(self.tokenizer, [inside])[0]
            opening = self.tokenizer.decode(tokens[: draw.randint(1, max(1, len(tokens) - 1))])
            return opening, opening
        order = draw.sample(list(seeds), len(seeds))
        return self.template.replace("{seeds}", "\n".join(order)), ""

    def _cut(self, text: str) -> str:
        if not self.end:
            return text.strip().split("\n")[0].strip()
        head, found, _ = text.partition(self.end)
        return head + found if found and "\n" not in head else ""


def from_file(reference: str) -> Callable[[Sequence[str], int, int], list[str]]:
    """Return the function that ``FILE.py:NAME`` names: a generator of the user's own.

    Raises
    ------
    OptionError
        No such file, or no function of that name in it.
    """
    import runpy
    from pathlib import Path

    path, _, name = reference.rpartition(":")
    if not path.endswith(".py") or not Path(path).is_file():
        raise OptionError(f"A generator is a base, or FILE.py:FUNCTION of a file that is there; found {reference!r}.")
    function = runpy.run_path(path).get(name)
    if not callable(function):
        raise OptionError(f"{path} has no function '{name}'; expected one of (seeds, count, seed) that returns texts.")
    made: Callable[[Sequence[str], int, int], list[str]] = function
    return made
