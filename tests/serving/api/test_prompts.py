"""Texts and bytes of single tokens, as vocabularies of several kinds write them."""

import pytest

from lorry.serving.http.prompts import Prompts


def tokenizer(vocabulary, decoder):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    found = Tokenizer(models.WordLevel({piece: place for place, piece in enumerate(vocabulary)}, unk_token="<unk>"))
    found.decoder = decoder
    return PreTrainedTokenizerFast(tokenizer_object=found, unk_token="<unk>")


def test_byte_level_pieces():
    from tokenizers import decoders

    prompts = Prompts(tokenizer(["<unk>", "a", "\u0120b", "\u00e2\u0124", "\u00ac"], decoders.ByteLevel()))
    assert [prompts.token_text(token) for token in (1, 2)] == ["a", " b"]
    assert [prompts.token_bytes(token) for token in (1, 2, 3, 4)] == [[97], [32, 98], [0xE2, 0x82], [0xAC]]
    assert bytes(prompts.token_bytes(3) + prompts.token_bytes(4)).decode() == "\u20ac"


def test_pieces_of_sentencepiece():
    from tokenizers import decoders

    decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(),
                                 decoders.Strip(" ", 1, 0)])  # fmt: skip
    prompts = Prompts(tokenizer(["<unk>", "a", "\u2581a", "<0xE2>"], decoder))
    assert [prompts.token_text(token) for token in (1, 2, 3)] == ["a", " a", "<0xE2>"]
    assert [prompts.token_bytes(token) for token in (1, 2, 3)] == [[97], [32, 97], [0xE2]]


@pytest.mark.parametrize("text", ["", "a"])
def test_without_a_template_there_is_no_conversation(text):
    from tokenizers import decoders

    from lorry.core.errors import OptionError

    prompts = Prompts(tokenizer(["<unk>", "a"], decoders.Fuse()))
    with pytest.raises(OptionError, match="no chat template"):
        prompts.chat([{"role": "user", "content": text}])
