"""The pocket model's tokenizer: one token for each printable ASCII character, newline as the end of text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from .world import Example

PAD, UNKNOWN, END = "<pad>", "<unk>", "\n"
CHARACTERS = [chr(code) for code in range(ord(" "), ord("~") + 1)]
IGNORED = -100

#: A user's turn is a prompt without its ``>``, the assistant's turn is the answer.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '>' }}{% endif %}"
    "{% endfor %}"
)


def build() -> Any:
    """A new ``PreTrainedTokenizerFast`` of 98 tokens, which adds no token and decodes without spaces."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: place for place, token in enumerate([PAD, END, UNKNOWN, *CHARACTERS])}
    characters = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    characters.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    characters.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=characters,
        pad_token=PAD,
        eos_token=END,
        unk_token=UNKNOWN,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=256,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def batch(
    tokenizer: Any,
    lines: Sequence[Example],
    padding_side: str = "right",
    device: torch.device | str = "cpu",
) -> dict[str, torch.Tensor]:
    """One padded training batch in which only the answers and their end of text are learned.

    Parameters
    ----------
    tokenizer
        Any Hugging Face tokenizer with a padding and an end-of-text token.
    lines
        At least one example.
    padding_side
        ``left`` or ``right``.
    device
        Where the tensors go.

    Returns
    -------
    dict
        ``input_ids``, ``attention_mask`` and ``labels``, int64, each (rows, longest row); labels are -100 on
        prompts and padding.
    """
    prompts = tokenizer([line.prompt for line in lines], add_special_tokens=False)["input_ids"]
    answers = tokenizer([line.answer for line in lines], add_special_tokens=False)["input_ids"]
    rows = [(prompt, [*reply, tokenizer.eos_token_id]) for prompt, reply in zip(prompts, answers, strict=True)]
    width = max(len(prompt) + len(answer) for prompt, answer in rows)
    ids = torch.full((len(rows), width), tokenizer.pad_token_id)
    mask = torch.zeros(len(rows), width, dtype=torch.long)
    labels = torch.full((len(rows), width), IGNORED)
    for place, (prompt, answer) in enumerate(rows):
        length = len(prompt) + len(answer)
        start = width - length if padding_side == "left" else 0
        ids[place, start : start + length] = torch.tensor(prompt + answer)
        mask[place, start : start + length] = 1
        labels[place, start + len(prompt) : start + length] = torch.tensor(answer)
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device), "labels": labels.to(device)}
