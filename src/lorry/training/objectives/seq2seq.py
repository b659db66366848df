"""Texts made of texts, by an encoder and a decoder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from lorry.core.life.state import unwrapped
from lorry.training.columns import COMPLETION_COLUMNS, PROMPT_COLUMNS, TEXT_COLUMNS, find_column, texts_of
from lorry.training.data import Record
from lorry.training.data_errors import DataError
from lorry.training.losses import TokenTally
from lorry.training.rows import IGNORE, Encoded, ints
from lorry.training.task import Batch, Examples, PlainReport, Setting, digest, register_task

from ._in_place import InPlace

INPUT_COLUMNS = ("input", "source", *PROMPT_COLUMNS, *TEXT_COLUMNS)
TARGET_COLUMNS = ("target", "summary", *COMPLETION_COLUMNS)


@dataclass(frozen=True, eq=False)
class Pair:
    """What the encoder reads, and the tokens ``(L,)`` that the decoder is to say."""

    rows: tuple[Encoded, ...]
    answer: Tensor


@register_task
@dataclass(frozen=True)
class Seq2Seq(InPlace):
    """Sequence to sequence: the answer to a text, for bases with an encoder and a decoder (T5, BART)."""

    name: ClassVar[str] = "seq2seq"
    task: ClassVar[str | None] = "seq2seq-lm"
    max_length: int = 256
    """Tokens of what is read; longer texts are cut."""
    max_target_length: int = 128
    """Tokens of what is said; longer texts are cut."""
    input_column: str | None = None
    """Column of the text that is read; guessed if not named."""
    target_column: str | None = None
    """Column of the text that is said; guessed if not named."""
    prefix: str = ""
    """Text before each input, such as ``summarize: ``."""

    def encode(
        self, tokenizer: Any, records: Sequence[Record], *, labels: Sequence[str] | None = None
    ) -> Examples[Any]:
        """Encode both texts with the tokenizer's own special tokens."""
        read = find_column(records, self.input_column, INPUT_COLUMNS, "text to read", "input_column")
        said = find_column(records, self.target_column, TARGET_COLUMNS, "text to say", "target_column")
        if read == said:
            raise DataError(f"The column {read!r} cannot be both input and target; name both.")
        inputs = [self.prefix + text for text in texts_of(records, read)]
        how: dict[str, Any] = {"truncation": True, "return_attention_mask": False}
        sources = tokenizer(inputs, max_length=self.max_length, **how)["input_ids"]
        answers = tokenizer(text_target=texts_of(records, said), max_length=self.max_target_length, **how)["input_ids"]
        pairs = [
            Pair((Encoded(ints(source), ints(source)),), ints(answer))
            for source, answer in zip(sources, answers, strict=True)
            if source and answer
        ]
        if not pairs:
            raise DataError(f"None of the {len(records)} records has both texts; check {read!r} and {said!r}.")
        return Examples(tuple(pairs), PlainReport(len(records), len(pairs)))

    def count(self, example: Pair) -> int:
        """Return the number of tokens to say."""
        return len(example.answer)

    def cost(self, example: Pair) -> int:
        """Return the number of tokens of the longer text."""
        return max(len(example.rows[0]), len(example.answer))

    def fingerprint(self, examples: Sequence[Pair]) -> str:
        """Return a hash of both texts."""
        return digest([(e.rows[0].input_ids, e.answer) for e in examples])

    def check(self, setting: Setting, examples: Examples[Any], name: str) -> None:
        """Refuse tokens that the model does not know, in either text."""
        super().check(setting, examples, name)
        answers = tuple(Encoded(e.answer, e.answer) for e in examples.examples)
        super().check(setting, Examples(answers, examples.report), name)

    def collate(self, setting: Setting, examples: Sequence[Pair]) -> Batch:
        """Pad both texts; the decoder reads its own text moved by one."""
        batch = super().collate(setting, examples)
        labels = torch.nn.utils.rnn.pad_sequence(
            [e.answer.long() for e in examples], batch_first=True, padding_value=IGNORE
        ).to(setting.device)
        model: Any = unwrapped(setting.model)
        read = model.prepare_decoder_input_ids_from_labels(labels)
        # the padding of the decoder's text is another, so methods are not told of one for all layers
        return replace(batch, inputs={**batch.inputs, "decoder_input_ids": read}, targets=labels, facts={})

    def tally(self, outputs: Tensor, targets: Tensor) -> TokenTally:
        """Return the sums for loss, perplexity and accuracy of tokens."""
        losses, counts = self.losses(outputs, targets)
        right = (outputs.argmax(-1) == targets).sum()  # -100 is no token
        return TokenTally(float(losses.double().sum()), int(counts.sum()), int(right))
