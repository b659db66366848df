"""A real tiny model with a tokenizer, data files, and the program to call."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

from lorry.cli.main import app

WORDS = ("red", "green", "blue", "one", "two", "three", "cat", "dog", "sun", "moon")


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny Llama (tied embeddings) and a word tokenizer."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("base")
    vocabulary = {w: i for i, w in enumerate(("<unk>", "</s>", "<pad>", ">", *WORDS))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>", pad_token="<pad>")
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.3,  # enough signal in a random base for an adapter to learn from
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Completions that a tiny model can learn: the next word of the list."""
    path = tmp_path_factory.mktemp("data") / "next.jsonl"
    pairs = [{"prompt": f"{a} >", "completion": f" {b}"} for a, b in zip(WORDS, WORDS[1:] + WORDS[:1], strict=True)]
    path.write_text("\n".join(map(json.dumps, pairs)) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def lorry() -> Callable[..., Result]:
    """Run the program in this process."""
    runner = CliRunner()

    def call(*arguments: object) -> Result:
        return runner.invoke(app, [str(a) for a in arguments])

    return call


@pytest.fixture(scope="session")
def run_json(lorry: Callable[..., Result]) -> Callable[..., Any]:
    """Run the program with --json and return the document; stdout must hold nothing else."""

    def call(*arguments: object) -> Any:
        result = lorry(*arguments, "--json")
        assert result.exit_code == 0, result.stderr
        return json.loads(result.stdout)

    return call


@pytest.fixture(scope="session")
def adapter(base: Path, data: Path, tmp_path_factory: pytest.TempPathFactory, run_json: Callable[..., Any]) -> Path:
    """An adapter trained by `lorry train` on the tiny model."""
    out = tmp_path_factory.mktemp("run") / "next"
    report = run_json(
        "train", "--base", base, "--data", data, "--out", out, "--objective", "completion",
        "--option", "rank=4", "--steps", 60, "--rate", "2e-2", "--batch-size", 10, "--name", "next",
    )  # fmt: skip
    return Path(report["jobs"][0]["adapter"])


@pytest.fixture(autouse=True)
def no_terminal(monkeypatch):
    """Test workers may be told the width of the terminal that started them; what is tested here goes into a pipe."""
    monkeypatch.delenv("COLUMNS", raising=False)
