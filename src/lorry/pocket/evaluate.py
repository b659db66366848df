"""One evaluation for all comparisons on the pocket world: the share of answers that are exactly right."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from .world import Example

#: Makes the context in which the rows ``start`` to ``stop`` of the list are answered.
Rows = Callable[[int, int], AbstractContextManager[Any]]


def answer(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    max_new_tokens: int,
    batch_size: int = 128,
    rows: Rows | None = None,
) -> list[str]:
    """Continue each prompt greedily until the end of text, in left-padded batches with a KV cache.

    Parameters
    ----------
    model
        A Hugging Face causal language model; put in eval mode for the call.
    tokenizer
        Its tokenizer, with a padding and an end-of-text token.
    prompts
        Any number of them.
    max_new_tokens
        The longest answer looked for, with its end of text.
    batch_size
        Prompts in one batch, taken in the order given.
    rows
        Context for each batch, for instance
        ``lambda start, stop: lorry.rows(model, names[start:stop])``.

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
                    found += _continue(model, tokenizer, chunk, max_new_tokens)
    finally:
        model.train(was_training)
    return found


def _continue(model: Any, tokenizer: Any, prompts: list[str], max_new_tokens: int) -> list[str]:
    """One batch of :func:`answer`."""
    coded = tokenizer(prompts, padding=True, padding_side="left", add_special_tokens=False, return_tensors="pt")
    coded = coded.to(model.device)
    tokens = model.generate(
        input_ids=coded["input_ids"],
        attention_mask=coded["attention_mask"],
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    texts = []
    for row in tokens[:, coded["input_ids"].shape[1] :].tolist():
        end = row.index(tokenizer.eos_token_id) if tokenizer.eos_token_id in row else len(row)
        texts.append(tokenizer.decode(row[:end]))
    return texts


def exact_match(
    model: Any, tokenizer: Any, examples: Sequence[Example], batch_size: int = 128, rows: Rows | None = None
) -> float:
    """The share, 0 to 1, of examples that the model answers exactly, end of text included.

    Arguments as in :func:`answer`. An answer that is right but does not end is wrong.

    Raises
    ------
    ValueError
        No examples.
    """
    if not examples:
        raise ValueError("Expected at least one example, found none.")
    longest = max(len(tokenizer.encode(one.answer, add_special_tokens=False)) for one in examples)
    # one token more than the longest answer with its end: enough to see any wrong one
    prompts = [one.prompt for one in examples]
    answers = answer(model, tokenizer, prompts, longest + 2, batch_size, rows)
    return sum(text == one.answer for text, one in zip(answers, examples, strict=True)) / len(examples)
