"""Held-out measurements of a base with any composition of adapters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

import lorry
from lorry.core.errors import OptionError


def apply_only(model: Any, composition: Mapping[str, float] | None) -> None:
    """Let a composition apply to the model; None or nothing is the bare base, adapters attached or not."""
    if composition or lorry.adapters(model):
        lorry.activate(model, dict(composition) if composition else None)


@torch.no_grad()
def held_out(
    model: Any,
    objective: Any,
    rows: Sequence[Any],
    pad_id: int,
    classes: int | None,
    batch_size: int,
    tick: Any = None,
) -> dict[str, float]:
    """Return the objective's metrics on encoded rows.

    Parameters
    ----------
    model
        In eval mode, with what should apply active.
    objective
        Gives the tally of a batch; see `lorry.training.objectives`.
    rows
        Encoded and not packed.
    pad_id
        Token that fills up rows.
    classes
        How many of the head's logits count; None for all.
    batch_size
        Rows of a batch.
    tick
        Called after each batch.
    """
    from lorry.training.batches import collate

    total: Any = None
    ordered = sorted(rows, key=len)
    for start in range(0, len(ordered), batch_size):
        chunk = ordered[start : start + batch_size]
        batch = collate(chunk, pad_id)
        labels = batch.pop("labels")
        if "token_type_ids" in batch and not hasattr(model.config, "type_vocab_size"):
            del batch["token_type_ids"]
        with _mask_known(model, batch["attention_mask"]):
            logits = model(**batch).logits
        tally = objective.tally(logits[..., :classes] if classes else logits, labels)
        total = tally if total is None else total + tally
        if tick is not None:
            tick()
    metrics: dict[str, float] = total.metrics()
    return metrics


def _mask_known(model: Any, mask: torch.Tensor) -> AbstractContextManager[Any]:
    """Tell methods that look at the padding where it is."""
    return lorry.context(model, padding_mask=mask.bool()) if lorry.adapters(model) else nullcontext()


def exact_match(
    model: Any, tokenizer: Any, pairs: Sequence[tuple[str, str]], batch_size: int, tick: Any = None
) -> float:
    """Return the share of prompts that greedy decoding continues exactly, up to spaces at both ends."""
    if not pairs:
        raise OptionError("Exact match needs prompts with completions, found none.")
    right = 0
    for start in range(0, len(pairs), batch_size):
        chunk = pairs[start : start + batch_size]
        longest = max(len(tokenizer(c, add_special_tokens=False)["input_ids"]) for _, c in chunk)
        texts = decode(model, tokenizer, [p for p, _ in chunk], {"max_new_tokens": longest + 2, "do_sample": False})
        right += sum(text.strip() == completion.strip() for text, (_, completion) in zip(texts, chunk, strict=True))
        if tick is not None:
            tick()
    return right / len(pairs)


def decode(model: Any, tokenizer: Any, prompts: Sequence[str | list[int]], options: Mapping[str, Any]) -> list[str]:
    """Return the continuation of each prompt of one left-padded batch, without special tokens.

    A prompt is a text, or its tokens where they are more than the text's (a conversation's).
    """
    from lorry.training.encode import special_prefix, tokenize

    if tokenizer.pad_token_id is None:
        raise OptionError("The tokenizer has neither a padding nor an end-of-text token, so prompts cannot be batched.")
    # the tokens of training: the special prefix and the text, never an end-of-text token
    prefix = special_prefix(tokenizer)
    coded = [prefix + tokenize(tokenizer, [p])[0] if isinstance(p, str) else p for p in prompts]
    if not all(coded):
        raise OptionError("A prompt is empty, and this tokenizer has no beginning-of-text token to start from.")
    width = max(map(len, coded))
    ids = torch.tensor([[tokenizer.pad_token_id] * (width - len(c)) + c for c in coded], device=model.device)
    mask = torch.tensor([[0] * (width - len(c)) + [1] * len(c) for c in coded], device=model.device)
    with torch.no_grad():
        tokens = model.generate(input_ids=ids, attention_mask=mask, pad_token_id=tokenizer.pad_token_id, **options)
    return list(tokenizer.batch_decode(tokens[:, width:], skip_special_tokens=True))
