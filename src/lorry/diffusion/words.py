"""Where words of a prompt stand among the tokens that a network attends to."""

from __future__ import annotations

import re
from typing import Any

from lorry.core.errors import near_misses
from lorry.diffusion.errors import DiffusionError


def word_positions(pipeline: Any, prompt: str, words: str) -> tuple[int, ...]:
    """Return the positions of words among the text tokens of a prompt, start token and all, at every place.

    Parameters
    ----------
    pipeline
        Of diffusers, with its tokenizers. Where a network is given the texts of two encoders one after the other
        (SD3), positions in both are returned.
    prompt
        The prompt.
    words
        One word, or several that follow each other; capital letters make no difference.

    Raises
    ------
    DiffusionError
        The words do not stand in the prompt, or only where it was cut off.
    """
    spans = word_spans(prompt, words)
    if not spans:
        there = re.findall(r"\w+", prompt)
        raise DiffusionError(
            f"The prompt '{prompt}' has no '{words}'.{near_misses(words, there)} Put it into the prompt, or name words "
            "that stand in it."
        )
    found: list[int] = []
    for tokenizer, start, before, after in _texts(pipeline):
        shift = len(before)
        shifted = [(first + shift, last + shift) for first, last in spans]
        places = _positions(tokenizer, f"{before}{prompt}{after}", shifted, words)
        found += [start + place for place in places if start + place >= 0]
    if not found:
        raise DiffusionError(f"'{words}' stands where the prompt '{prompt}' is cut off; make the prompt shorter.")
    return tuple(found)


def word_spans(prompt: str, words: str) -> list[tuple[int, int]]:
    """Return where words begin and end in a text, as whole words."""
    pattern = r"\s+".join(re.escape(word) for word in words.split())
    return [m.span() for m in re.finditer(rf"(?<!\w){pattern}(?!\w)", prompt, re.IGNORECASE)] if pattern else []


def replaced(prompt: str, words: str, other: str) -> str:
    """Return a prompt with other words in the place of some."""
    for first, last in reversed(word_spans(prompt, words)):
        prompt = prompt[:first] + other + prompt[last:]
    return prompt


def _texts(pipeline: Any) -> list[tuple[Any, int, str, str]]:
    """Return each tokenizer whose tokens the network attends to: it, where they begin, text before and after."""
    parts = pipeline.components
    if "tokenizer_3" in parts:
        first = parts["tokenizer"]
        texts = [(first, 0, "", ""), (parts["tokenizer_3"], first.model_max_length, "", "")]
        return [text for text in texts if text[0] is not None]
    template = getattr(pipeline, "prompt_template_encode", None)
    if template is not None:
        before, _, after = template.partition("{}")
        return [(parts["tokenizer"], -pipeline.prompt_template_encode_start_idx, before, after)]
    # U-Nets attend to the tokens of both tokenizers at the same places, transformers to those of the second alone
    second = "transformer" in parts and "tokenizer_2" in parts
    return [(parts["tokenizer_2" if second else "tokenizer"], 0, "", "")]


def _positions(tokenizer: Any, text: str, spans: list[tuple[int, int]], words: str) -> list[int]:
    """Return the tokens of a text that cover some of its letters."""
    if getattr(tokenizer, "is_fast", False):
        places = tokenizer(text, return_offsets_mapping=True, truncation=True)["offset_mapping"]
        # some tokenizers count the space before a word as its first letter
        inside = [any(low < last and high > first for first, last in spans) for low, high in places]
        return [i for i, chosen in enumerate(inside) if chosen and text[slice(*places[i])].strip()]
    ids = tokenizer(text, truncation=True)["input_ids"]
    word = tokenizer(words, add_special_tokens=False)["input_ids"]
    starts = [i for i in range(len(ids) - len(word) + 1) if ids[i : i + len(word)] == word]
    return [start + i for start in starts for i in range(len(word))]
