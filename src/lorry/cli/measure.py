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
    classes
        How many of the head's logits count; None for all.
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
    from lorry.cli.generate import decode

    if not pairs:
        raise OptionError("Exact match needs prompts with completions, found none.")
    right = 0
    for start in range(0, len(pairs), batch_size):
        chunk = pairs[start : start + batch_size]
        longest = max(len(tokenizer(c, add_special_tokens=False)["input_ids"]) for _, c in chunk)
        texts = decode(
            model, tokenizer, [p for p, _ in chunk], {"max_new_tokens": longest + 2, "do_sample": False}
        )
        right += sum(
            text.strip() == completion.strip() for text, (_, completion) in zip(texts, chunk, strict=True)
        )
        if tick is not None:
            tick()
    return right / len(pairs)
