"""Adapters and texts in one space: a retriever that is trained by contrast."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from lorry.core.errors import OptionError
from lorry.core.options import check_options, option
from lorry.depot.encoder import AdapterEncoder, EncoderShape, Factors, Shapes, Stack, taken

#: Texts -> vectors ``(texts, width)``: a text encoder of one's own.
TextEncoder = Callable[[Sequence[str]], Tensor]


class BagOfWords:
    """Texts as counts of known words, for captions of a few words without any model.

    Parameters
    ----------
    words
        The vocabulary.
    """

    def __init__(self, words: Sequence[str]) -> None:
        self.words = list(words)
        self._index = {word: i for i, word in enumerate(self.words)}

    @classmethod
    def of(cls, texts: Sequence[str]) -> BagOfWords:
        """Return the one that knows the words of these texts."""
        return cls(sorted({word for text in texts for word in words_of(text)}))

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Return ``(texts, words)``; unknown words count for nothing."""
        found = torch.zeros(len(texts), len(self.words))
        for row, text in enumerate(texts):
            for word in words_of(text):
                if word in self._index:
                    found[row, self._index[word]] += 1
        return found


def words_of(text: str) -> list[str]:
    """Return the words of a text, in lower case."""
    return re.findall(r"\w+", text.lower())


class Encoder(Protocol):
    """What makes vectors of adapters: `lorry.depot.encoder.AdapterEncoder`, or what is held against it; a module."""

    def stacked(self, adapters: Sequence[Factors]) -> Stack:
        """Return adapters side by side."""

    def encode(self, stack: Stack) -> Tensor:
        """Return ``(adapters, tokens, out)``, of which the first token counts."""


class Retriever(nn.Module):
    """An encoder of adapters, a linear map of text vectors, and a temperature.

    Parameters
    ----------
    shapes, shape
        See `AdapterEncoder`.
    text_width
        Of the text vectors.
    seed
        Of the start.
    encoder
        A module in place of an `AdapterEncoder`, whose results have the width ``shape.out``.
    """

    def __init__(
        self, shapes: Shapes, shape: EncoderShape, text_width: int, seed: int = 0, *, encoder: Encoder | None = None
    ) -> None:
        super().__init__()
        self.adapters: Any = AdapterEncoder(shapes, shape, seed) if encoder is None else encoder
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed + 1)
            self.texts = nn.Linear(text_width, shape.out)
        self.log_temperature = nn.Parameter(torch.tensor(math.log(0.07)))

    def of_adapters(self, adapters: Sequence[Factors]) -> Tensor:
        """Return unit vectors ``(adapters, out)``."""
        return self.of_stack(self.adapters.stacked(adapters))

    def of_stack(self, stack: Stack) -> Tensor:
        """Return unit vectors ``(adapters, out)`` of adapters side by side."""
        return F.normalize(self.adapters.encode(stack)[:, 0], dim=-1)

    def of_texts(self, vectors: Tensor) -> Tensor:
        """Return unit vectors ``(texts, out)``."""
        return F.normalize(self.texts(vectors.to(self.texts.weight)), dim=-1)

    def loss(self, adapters: Tensor, texts: Tensor) -> Tensor:
        """Return the symmetric InfoNCE of unit vectors that belong together row by row."""
        scores = adapters @ texts.mT / self.log_temperature.exp()
        own = torch.arange(len(scores), device=scores.device)
        return (F.cross_entropy(scores, own) + F.cross_entropy(scores.mT, own)) / 2


@dataclass(frozen=True)
class RetrieverTraining:
    """How a retriever is trained.

    Raises
    ------
    OptionError
        A value out of its range.
    """

    steps: int = option(300, "Optimizer steps.", at_least=1)
    rows: int = option(32, "Adapters of a step; fewer where there are not so many.", at_least=2)
    rate: float = option(1e-3, "Learning rate of AdamW, falling by a cosine.", above=0)
    weight_decay: float = option(1e-2, "Its weight decay.", at_least=0)

    def __post_init__(self) -> None:
        """Check every option against its range."""
        check_options(self)


def train_retriever(
    retriever: Retriever,
    adapters: Sequence[Factors],
    captions: Sequence[Sequence[str]],
    encode: TextEncoder,
    settings: RetrieverTraining,
    seed: int,
) -> list[float]:
    """Train a retriever in place and return the loss of each step.

    Parameters
    ----------
    retriever
        A fresh one.
    adapters
        Their factors.
    captions
        What each adapter makes, one text or more for each; a step draws one.
    encode
        Texts to vectors; it is not trained.
    settings
        How.
    seed
        Of the draws.

    Raises
    ------
    OptionError
        Fewer than two adapters, or one without a caption.
    """
    if len(adapters) < 2 or len(captions) != len(adapters) or not all(captions):
        raise OptionError(
            f"A retriever learns from two adapters or more, each with a caption; found {len(adapters)} adapters, of "
            f"which {sum(map(bool, captions))} have one."
        )
    g, losses = Generator().manual_seed(seed), []
    with torch.no_grad():
        vectors = [encode(list(texts)) for texts in captions]
        together = retriever.adapters.stacked(adapters)
    optimizer = torch.optim.AdamW(retriever.parameters(), settings.rate, weight_decay=settings.weight_decay)
    course = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, settings.steps)
    retriever.train()
    for _ in range(settings.steps):
        picked = torch.randperm(len(adapters), generator=g)[: settings.rows].tolist()
        drawn = [vectors[i][int(torch.randint(len(vectors[i]), (), generator=g))] for i in picked]
        loss = retriever.loss(retriever.of_stack(taken(together, picked)), retriever.of_texts(torch.stack(drawn)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        course.step()
        losses.append(float(loss.detach()))
    retriever.eval()
    return losses


def recall_at(scores: Tensor, k: int = 1) -> float:
    """Return the share of rows ``(queries, candidates)`` whose own candidate, that of the same number, is among the
    first k.
    """
    own = torch.arange(len(scores)).unsqueeze(1)
    return float((scores.topk(k, -1).indices == own).any(-1).double().mean())
