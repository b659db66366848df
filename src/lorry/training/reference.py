"""What a task asks the model while it draws its examples: as a reference, as a teacher, or as the policy itself.

Nothing here leaves a trace: no gradient, no dropout, no auxiliary loss, and the mode of every module is put back.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lorry.core.life.api import context, rows

from .data_errors import DataError
from .encode import special_prefix, tokenize
from .rows import IGNORE, Encoded, ints
from .task import Setting
from .text_task import TextTask


@contextmanager
def asking(model: nn.Module, adapter: str | None, count: int) -> Iterator[None]:
    """Ask the model without gradients and without dropout, under one adapter or none.

    Parameters
    ----------
    model
        A model with adapters.
    adapter
        The adapter that applies; None is the bare base, which is the reference of every job on it.
    count
        Rows of the batch that is asked about.
    """
    before = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad(), rows(model, [adapter] * count):
            yield
    finally:
        for module, was in before:
            module.training = was


def ask(task: TextTask, setting: Setting, examples: Sequence[Encoded], adapter: str | None) -> tuple[Tensor, Tensor]:
    """Return what the model says of rows, and their labels: logits ``(n, L, V)`` and ``(n, L)``."""
    batch = TextTask.collate(task, setting, examples)
    with asking(setting.model, adapter, len(examples)), context(setting.model, **batch.facts):
        return TextTask.forward(task, setting, batch), batch.targets


def label_logits(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the logits that predict labels, the labels, and the rows that they are of.

    Parameters
    ----------
    logits
        ``(n, L, V)``; ``logits[:, t]`` predicts ``labels[:, t + 1]``.
    labels
        ``(n, L)``, -100 where nothing is predicted.

    Returns
    -------
    tuple[Tensor, Tensor, Tensor]
        ``(k, V)`` in float32 or better, ``(k,)`` and ``(k,)``, row after row.
    """
    scored = labels[:, 1:] != IGNORE
    chosen = logits[:, :-1][scored]
    row = scored.nonzero()[:, 0]
    return chosen.to(torch.promote_types(chosen.dtype, torch.float32)), labels[:, 1:][scored], row


def token_log_probabilities(logits: Tensor, labels: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Return the log-probability of each label ``(k,)``, and the row that it is of ``(k,)``; see `label_logits`."""
    chosen, wanted, row = label_logits(logits, labels)
    return -F.cross_entropy(chosen / temperature, wanted, reduction="none"), row


def row_sums(values: Tensor, row: Tensor, rows_in_all: int) -> Tensor:
    """Return the sum of values for each row, ``(rows_in_all,)``."""
    return values.new_zeros(rows_in_all).index_add(0, row, values)


def log_probabilities(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the log-probability of the labelled tokens of each row, summed, and how many they are: two ``(n,)``."""
    values, row = token_log_probabilities(logits, labels)
    return row_sums(values, row, len(labels)), row_sums(torch.ones_like(values), row, len(labels))


def continued(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str | Tensor],
    *,
    generator: torch.Generator,
    max_new_tokens: int,
    temperature: float = 1.0,
) -> list[tuple[Tensor, Tensor]]:
    """Let a model go on with prompts, all in one left-padded batch.

    Parameters
    ----------
    model
        A model of transformers, with what should apply in force.
    tokenizer
        Of the model; without it, prompts are tokens, and nothing ends before `max_new_tokens`.
    prompts
        Texts, or tokens ``(L,)``.
    generator
        Source of randomness.
    max_new_tokens
        Most tokens that are added.
    temperature
        Divides the logits; 0 takes the likeliest token.

    Returns
    -------
    list
        For each prompt its tokens, and those that were added, with the end of text if it came: int32.
    """
    coded = [
        p.tolist() if isinstance(p, Tensor) else [*special_prefix(tokenizer), *tokenize(tokenizer, [p])[0]]
        for p in prompts
    ]
    if not all(coded):
        raise DataError("A prompt is empty, and this tokenizer has no beginning-of-text token to start from.")
    width, device = max(map(len, coded)), next(model.parameters()).device
    end = getattr(tokenizer, "eos_token_id", None)
    pad = next((t for t in (getattr(tokenizer, "pad_token_id", None), end) if t is not None), 0)
    ids = torch.tensor([[pad] * (width - len(c)) + c for c in coded], device=device)
    mask = torch.tensor([[0] * (width - len(c)) + [1] * len(c) for c in coded], device=device)
    how: dict[str, Any] = {"do_sample": temperature > 0, "max_new_tokens": max_new_tokens, "pad_token_id": pad}
    how |= {"eos_token_id": end} if end is not None else {}
    how |= {"temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature > 0 else {}
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(int(torch.randint(2**62, (), generator=generator)))
        tokens = model.generate(input_ids=ids, attention_mask=mask, **how)[:, width:].cpu()
    found = []
    for prompt, new in zip(coded, tokens, strict=True):
        ended = (new == end).nonzero() if end is not None else new.new_zeros(0)
        kept = new[: int(ended[0]) + 1] if len(ended) else new
        found.append((ints(prompt), kept.int()))
    return found
