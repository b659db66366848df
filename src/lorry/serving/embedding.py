"""Vectors of texts: the base's last hidden states with a composition of adapters, pooled."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor

from lorry.serving.engine import Engine
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
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    tokens = torch.zeros(len(prompts), int(lengths.max()), dtype=torch.long)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = torch.tensor(prompt)
    mask = (torch.arange(tokens.shape[1]) < lengths[:, None]).long()
    with engine.applied(composition) as model:
        device = next(model.parameters()).device
        tokens, mask, lengths = tokens.to(device), mask.to(device), lengths.to(device)
        fewer = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(type(model).forward).parameters else {}
        found = model(tokens, attention_mask=mask, output_hidden_states=True, use_cache=False, **fewer)
    states: Tensor = found.hidden_states[-1].float()
    if pooling == "last":
        vectors = states[torch.arange(len(prompts), device=device), lengths - 1]
    else:
        vectors = (states * mask[..., None]).sum(1) / lengths[:, None]
    return (torch.nn.functional.normalize(vectors, dim=-1) if normalize else vectors).cpu()
