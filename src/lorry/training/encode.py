"""From text to rows of tokens: causal, completion and classification encoding (chat has its own file)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .data_errors import DataError
from .rows import IGNORE, Builder, Encoded, EncodedSet, Truncation, ints, masked_starts, pack_fit, pack_stream


def tokenize(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of each text, without special tokens."""
    if not texts:
        return []
    out = tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False)
    return [list(ids) for ids in out["input_ids"]]


def special_prefix(tokenizer: Any) -> list[int]:
    """The special tokens that the tokenizer puts before a text (beginning-of-text, for most that have
    one).
    """
    for probe in ("a", "A", "1", " ", "."):
        raw = tokenize(tokenizer, [probe])[0]
        if raw:
            whole = list(tokenizer(probe)["input_ids"])
            for start in range(len(whole) - len(raw) + 1):
                if whole[start : start + len(raw)] == raw:
                    return whole[:start]
    return []


def encode_causal(
    tokenizer: Any,
    texts: Sequence[str],
    *,
    max_length: int,
    packing: bool = False,
    add_eos: bool = True,
) -> EncodedSet:
    """Encode documents for next-token prediction on every token.

    Each document becomes special prefix, tokens, and end-of-text. Without packing it is cut into blocks of at
    most ``max_length``. With packing all documents are laid end to end and cut into rows of exactly
    ``max_length`` (the last row is shorter); position ids restart at each document, whose first token is
    never a label.

    Parameters
    ----------
    tokenizer
        A Hugging Face tokenizer.
    texts
        Documents; blank ones are dropped and counted.
    max_length
        Tokens of a row, at least 2.
    packing
        Fill rows with several documents.
    add_eos
        End documents with the tokenizer's end-of-text token, if it has one.

    Raises
    ------
    DataError
        ``max_length`` below 2, or nothing left to train on.
    """
    builder = Builder(max_length)
    prefix, eos = special_prefix(tokenizer), _eos(tokenizer) if add_eos else []
    documents: list[Tensor] = []
    for text, ids in zip(texts, tokenize(tokenizer, texts), strict=True):
        if not text.strip() or not ids:
            builder.drop("without text")
        elif len(prefix) + len(ids) + len(eos) < 2:
            builder.drop("of a single token")
        else:
            builder.records += 1
            documents.append(ints(prefix + ids + (eos if ids[-1:] != eos else [])))
    if packing:
        rows = pack_stream(documents, max_length)
    else:
        first = torch.zeros(1, dtype=torch.long)
        blocks = (block for document in documents for block in torch.split(document, max_length))
        rows = [Encoded(block, masked_starts(block, first)) for block in blocks]
    kept = [row for row in rows if row.label_count]
    left_out = sum(len(row) for row in rows) - sum(len(row) for row in kept)
    if left_out:  # a last block of one token, say
        builder.note("tokens left out in blocks without anything to predict", left_out)
    return builder.finish(kept)


def _eos(tokenizer: Any) -> list[int]:
    return [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]


def encode_completion(
    tokenizer: Any,
    pairs: Sequence[tuple[str, str]],
    *,
    max_length: int,
    packing: bool = False,
    truncation: Truncation = "right",
    add_eos: bool = True,
) -> EncodedSet:
    """Encode prompts with completions; only the completion and the end-of-text token are labels.

    The prompt's tokens are those that it has alone, as at generation: where tokenising prompt and completion
    together would merge a token across the border, the two are tokenised apart.

    Parameters
    ----------
    tokenizer
        A Hugging Face tokenizer.
    pairs
        (prompt, completion) texts; an empty completion is dropped and counted.
    max_length
        Tokens of a row, at least 2.
    packing
        Put several whole examples into a row.
    truncation
        What is cut off an example that is too long (``left`` keeps the special prefix).
    add_eos
        End completions with the tokenizer's end-of-text token, if it has one.

    Raises
    ------
    DataError
        ``max_length`` below 2, unknown truncation, or nothing left to train on.
    """
    builder = _completions(tokenizer, pairs, max_length, truncation, add_eos)
    return builder.finish(pack_fit(builder.rows, max_length) if packing else None)


def completion_rows(
    tokenizer: Any,
    pairs: Sequence[tuple[str, str]],
    *,
    max_length: int,
    truncation: Truncation = "right",
    add_eos: bool = True,
) -> list[Encoded | None]:
    """Encode prompts with completions one by one: a row for each pair, None for what `encode_completion` leaves out."""
    builder = _completions(tokenizer, pairs, max_length, truncation, add_eos)
    rows: list[Encoded | None] = [None] * len(pairs)
    for source, row in zip(builder.sources, builder.rows, strict=True):
        rows[source] = row
    return rows


def _completions(
    tokenizer: Any, pairs: Sequence[tuple[str, str]], max_length: int, truncation: Truncation, add_eos: bool
) -> Builder:
    prefix, eos = special_prefix(tokenizer), _eos(tokenizer) if add_eos else []
    builder = Builder(max_length, truncation, len(prefix))
    prompts = tokenize(tokenizer, [p for p, _ in pairs])
    wholes = tokenize(tokenizer, [p + c for p, c in pairs])
    for (_, completion), prompt, whole in zip(pairs, prompts, wholes, strict=True):
        if not completion:
            builder.drop("without a completion")
            continue
        if whole[: len(prompt)] == prompt and len(whole) > len(prompt):
            answer = whole[len(prompt) :]
        else:
            answer = _continuation(tokenizer, completion)
        answer = answer + (eos if answer[-1:] != eos else [])
        builder.add(prefix + prompt + answer, [IGNORE] * (len(prefix) + len(prompt)) + answer)
    return builder


def _continuation(tokenizer: Any, text: str) -> list[int]:
    """Tokens of a text that goes on after another, so without the space some tokenizers put before a first
    word.
    """
    for anchor in ("\n", ".", "a"):
        before, both = tokenize(tokenizer, [anchor, anchor + text])
        if before and both[: len(before)] == before and len(both) > len(before):
            return both[len(before) :]
    return tokenize(tokenizer, [text])[0]


def encode_classification(
    tokenizer: Any,
    texts: Sequence[str],
    labels: Sequence[int],
    *,
    pairs: Sequence[str] | None = None,
    max_length: int,
    truncation: Truncation = "right",
) -> EncodedSet:
    """Encode texts, or pairs of texts, with their classes. Special tokens are the tokenizer's own.

    Parameters
    ----------
    tokenizer
        A Hugging Face tokenizer.
    texts
        N texts; blank ones are dropped and counted.
    labels
        N classes.
    pairs
        N second texts.
    max_length
        Tokens of a row, at least 2.
    truncation
        ``right`` (of a pair, the longer text is cut) or ``drop``.

    Raises
    ------
    DataError
        ``truncation='left'``, ``max_length`` below 2, or nothing left.
    """
    if truncation == "left":
        raise DataError("Classification cuts at the right or drops; found truncation='left'.")
    builder = Builder(max_length, truncation)
    options: dict[str, Any] = {"return_attention_mask": False, "verbose": False}
    second = (list(pairs),) if pairs is not None else ()
    full = tokenizer(list(texts), *second, **options)["input_ids"]
    cut = tokenizer(list(texts), *second, truncation=True, max_length=max_length, **options)
    types = cut.get("token_type_ids") if pairs is not None else None
    for i, label in enumerate(labels):
        long = len(full[i]) > max_length
        if not texts[i].strip() or not cut["input_ids"][i]:
            builder.drop("without text")
        elif long and truncation == "drop":
            builder.drop("longer than max_length")
        else:
            builder.records += 1
            builder.truncated += long
            kinds = ints(types[i]) if types is not None else None
            builder.rows.append(Encoded(ints(cut["input_ids"][i]), label=label, token_type_ids=kinds))
    return builder.finish()
