"""Vectors of texts: the base's last hidden states with a composition of adapters, pooled."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor

from lorry.serving.engine import Engine
from lorry.serving.modes.mode import last_states
from lorry.serving.request import Composition

#: ``mean`` of all tokens' states, or the state of the ``last``.
Pooling = Literal["mean", "last"]


def batches(prompts: Sequence[Sequence[int]], most: int) -> Iterator[list[int]]:
    """Yield the places of prompts that go through the model together, of like lengths, within so many tokens."""
    order = sorted(range(len(prompts)), key=lambda place: len(prompts[place]))
    chosen: list[int] = []
    for place in order:
        if chosen and (len(chosen) + 1) * len(prompts[place]) > most:
            yield chosen
            chosen = []
        chosen.append(place)
    if chosen:
        yield chosen


@torch.no_grad()
def embed(
    engine: Engine,
    prompts: Sequence[Sequence[int]],
    composition: Composition,
    *,
    pooling: Pooling = "mean",
    normalize: bool = True,
) -> Tensor:
    """Return a vector for each prompt.

    Parameters
    ----------
    engine
        Whose model is used, between two of its steps.
    prompts
        Tokens, at least one in each.
    composition
        Which adapters apply.
    pooling, normalize
        How states become one vector, and whether it has length 1 then.

    Returns
    -------
    Tensor
        float32 of shape (prompts, hidden size), on the CPU.

    Raises
    ------
    AdapterError
        An adapter that is not served.
    """
    with engine.applied(composition) as model:
        tokens, mask = padded(prompts, next(model.parameters()).device)
        states = last_states(model, tokens, mask)
    return pooled(states.float(), mask, pooling=pooling, normalize=normalize)


def padded(prompts: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Return tokens and mask ``(prompts, tokens)`` of prompts of several lengths."""
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    tokens = torch.zeros(len(prompts), int(lengths.max()), dtype=torch.long)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = torch.tensor(prompt)
    mask = (torch.arange(tokens.shape[1]) < lengths[:, None]).long()
    return tokens.to(device), mask.to(device)


def pooled(states: Tensor, mask: Tensor, *, pooling: Pooling, normalize: bool) -> Tensor:
    """Return one vector for each row, on the CPU.

    Parameters
    ----------
    states, mask
        ``(rows, tokens, width)`` and ``(rows, tokens)``, padded at the end.
    pooling, normalize
        As for `embed`.
    """
    lengths = mask.sum(1)
    if pooling == "last":
        vectors = states[torch.arange(len(states), device=states.device), lengths - 1]
    else:
        vectors = (states * mask[..., None]).sum(1) / lengths[:, None]
    return (torch.nn.functional.normalize(vectors, dim=-1) if normalize else vectors).cpu()
