"""One evaluation for all comparisons on pictures: the share of answers that are exactly right."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from ..evaluate import Rows
from .networks import IMAGE, pixels
from .questions import Question
from .world import pictures


def prompts_of(processor: Any, prompts: Sequence[str], device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """Prompts about one picture each, padded at the left: ``input_ids`` and ``attention_mask``."""
    patches = (processor.image_processor.crop_size["height"] // processor.patch_size) ** 2
    texts = [IMAGE * patches + prompt for prompt in prompts]
    found = processor.tokenizer(texts, padding=True, padding_side="left", add_special_tokens=False, return_tensors="pt")
    return {name: found[name].to(device) for name in ("input_ids", "attention_mask")}


def answer(
    model: Any,
    processor: Any,
    shown: Tensor,
    prompts: Sequence[str],
    max_new_tokens: int,
    batch_size: int = 128,
    rows: Rows | None = None,
) -> list[str]:
    """Answer each prompt about its picture greedily until the end of text, in left-padded batches with a KV cache.

    Parameters
    ----------
    model, processor
        The pocket VLM, or another LLaVA with pictures of this size and a tower that drops its first token.
    shown
        Pictures, (prompts, 3, 48, 48) in uint8.
    prompts
        One for each picture, such as ``colour:ring>``.
    max_new_tokens
        The longest answer looked for, with its end of text.
    batch_size
        Prompts in one batch, taken in the order given.
    rows
        Context for each batch, as for `lorry.pocket.answer`.

    Returns
    -------
    list
        The answers in the order of the prompts, without the end of text.
    """
    was_training = model.training
    model.eval()
    found: list[str] = []
    try:
        with torch.no_grad():
            for start in range(0, len(prompts), batch_size):
                chunk = list(prompts[start : start + batch_size])
                with rows(start, start + len(chunk)) if rows else nullcontext():
                    found += _continue(model, processor, shown[start : start + len(chunk)], chunk, max_new_tokens)
    finally:
        model.train(was_training)
    return found


def _continue(model: Any, processor: Any, shown: Tensor, prompts: list[str], max_new_tokens: int) -> list[str]:
    """One batch of :func:`answer`."""
    tokenizer = processor.tokenizer
    given = prompts_of(processor, prompts, model.device)
    tokens = model.generate(
        **given,
        pixel_values=pixels(shown).to(model.device, model.dtype),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    texts = []
    for row in tokens[:, given["input_ids"].shape[1] :].tolist():
        end = row.index(tokenizer.eos_token_id) if tokenizer.eos_token_id in row else len(row)
        texts.append(tokenizer.decode(row[:end]))
    return texts


def exact_match(
    model: Any, processor: Any, asked: Sequence[Question], batch_size: int = 128, rows: Rows | None = None
) -> float:
    """The share, 0 to 1, of questions that the model answers exactly, end of text included.

    Arguments as in :func:`answer`. An answer that is right but does not end is wrong.

    Raises
    ------
    ValueError
        No questions.
    """
    if not asked:
        raise ValueError("Expected at least one question, found none.")
    longest = max(len(one.answer) for one in asked)
    shown = pictures(one.picture for one in asked)
    found = answer(model, processor, shown, [one.prompt for one in asked], longest + 2, batch_size, rows)
    return sum(text == one.answer for text, one in zip(found, asked, strict=True)) / len(asked)
