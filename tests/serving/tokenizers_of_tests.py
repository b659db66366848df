"""Real tokenizers of three sorts: characters, SentencePiece with bytes, and byte-level BPE."""

from functools import cache

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from lorry.pocket import PATH


@cache
def pocket():
    return AutoTokenizer.from_pretrained(PATH, local_files_only=True)


@cache
def stories(shared):
    return AutoTokenizer.from_pretrained(shared / "models" / "stories260k", local_files_only=True)


@cache
def byte_level():
    """A BPE over bytes, as GPT-2's, with an end of text and a marker of turns."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=340, initial_alphabet=alphabet, special_tokens=["<|end|>", "<|im start|>"], show_progress=False
    )
    tokenizer.train_from_iterator(['{"name": "größer", "n": 12}, 日本語の🙂🙂 text, "x": [true, false]'] * 8, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|end|>", additional_special_tokens=["<|im start|>"]
    )
