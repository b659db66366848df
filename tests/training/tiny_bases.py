"""Small real bases and rows for the tests of the fleet engine."""

from pathlib import Path

import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from lorry.training.rows import IGNORE, Encoded, EncodedSet, EncodeReport, ints

VOCABULARY = 97


def tiny_llama(seed: int = 0) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    torch.manual_seed(seed)
    return LlamaForCausalLM(config)


def tiny_bert(labels: int = 2, seed: int = 0) -> BertForSequenceClassification:
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        num_labels=labels,
    )
    torch.manual_seed(seed)
    return BertForSequenceClassification(config)


def token_rows(count: int, lengths: tuple[int, int], seed: int, vocabulary: int = VOCABULARY) -> EncodedSet:
    """Rows of a language with a rule, so that a loss can fall: each token is the one before plus a step."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(count):
        length, start, step = (
            int(torch.randint(low, high + 1, (), generator=generator))
            for low, high in ((lengths[0], lengths[1]), (1, vocabulary - 1), (1, 5))
        )
        ids = (start + step * torch.arange(length)) % (vocabulary - 1) + 1
        rows.append(Encoded(ids.int(), torch.cat([ints([IGNORE]), ids[1:].int()])))
    return encoded(rows)


def class_rows(count: int, classes: int, seed: int) -> EncodedSet:
    """Rows whose class is told by their first token."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(count):
        length = int(torch.randint(3, 9, (), generator=generator))
        ids = torch.randint(classes, VOCABULARY, (length,), generator=generator)
        label = int(torch.randint(0, classes, (), generator=generator))
        ids[0] = label
        rows.append(Encoded(ids.int(), label=label))
    return encoded(rows)


def encoded(rows: list[Encoded]) -> EncodedSet:
    tokens, labels = sum(map(len, rows)), sum(r.label_count for r in rows)
    return EncodedSet(tuple(rows), EncodeReport(len(rows), len(rows), len(rows), {}, 0, tokens, labels))


def stories(shared: Path) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    folder = shared / "models" / "stories260k"
    return LlamaForCausalLM.from_pretrained(folder), PreTrainedTokenizerFast.from_pretrained(folder)
