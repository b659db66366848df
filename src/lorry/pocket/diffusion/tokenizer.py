"""Tokenizers of the pocket diffusion models: every word of the world is one token, other words are spelled out."""

from __future__ import annotations

import string
from collections import Counter
from typing import Any

from .world import vocabulary

#: Tokens of a prompt with its start and end, padding included.
TOKENS = 24
START, END = "<|startoftext|>", "<|endoftext|>"
#: What can stand beside the words: a prompt may hold commas, digits and trigger words of any letters.
_CHARACTERS = string.ascii_lowercase + string.digits + ".,;:!?'-_()[]<>+*&/"


def merges_of(words: tuple[str, ...]) -> list[tuple[str, str]]:
    """Byte-pair merges after which each word is one token.

    The commonest pair is merged first, in all words at once, until nothing is left to merge: the order in which the
    tokenizer applies them is the one in which they were found, so no word is cut differently.
    """
    pieces = [[*word[:-1], f"{word[-1]}</w>"] for word in words]
    merges: list[tuple[str, str]] = []
    while True:
        pairs = Counter(pair for word in pieces for pair in zip(word, word[1:], strict=False))
        if not pairs:
            return merges
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        pieces = [_merge(word, best) for word in pieces]


def _merge(pieces: list[str], pair: tuple[str, str]) -> list[str]:
    merged: list[str] = []
    for piece in pieces:
        if merged and (merged[-1], piece) == pair:
            merged[-1] += piece
        else:
            merged.append(piece)
    return merged


def clip_tokenizer(more: tuple[str, ...] = (), tokens: int = TOKENS) -> Any:
    """A new ``CLIPTokenizer`` whose prompts are padded with their end.

    Parameters
    ----------
    more
        Lower-case words to be one token each, beside those of the world.
    tokens
        Of a prompt at most.
    """
    from transformers import CLIPTokenizer

    merges = merges_of((*vocabulary(), *more))
    pieces = [*_CHARACTERS, *(f"{one}</w>" for one in _CHARACTERS), *(first + second for first, second in merges)]
    places = {token: place for place, token in enumerate(dict.fromkeys([START, END, *pieces]))}
    return CLIPTokenizer(
        vocab=places,
        merges=merges,
        bos_token=START,
        eos_token=END,
        pad_token=END,
        unk_token=END,
        model_max_length=tokens,
    )


def t5_tokenizer() -> Any:
    """A new ``T5Tokenizer``: 24 tokens a prompt, closed by ``</s>``."""
    from transformers import T5Tokenizer

    # a word as a whole must win over its letters: scores are log-probabilities, and every piece costs
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    pieces += [(f"▁{word}", -3.0) for word in vocabulary()]
    pieces += [(character, -10.0) for character in _CHARACTERS]
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=TOKENS)
