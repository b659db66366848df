"""The worked example of docs/adding-a-method.md is taken from the page and runs through the whole spine."""

import re
import sys
import types
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import lorry
from lorry.core.method.registry import METHODS

PAGE = Path(__file__).parents[2] / "docs" / "adding-a-method.md"


def tiny_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def example(monkeypatch):
    code = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)[0]
    lorry.methods()
    monkeypatch.setattr(METHODS, "_items", dict(METHODS))
    module = types.ModuleType("lorry.methods.weighted_lora")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    exec(compile(code, str(PAGE), "exec"), module.__dict__)
    return module


def test_the_example_is_a_method_like_any_other(example, tmp_path):
    model, tokens = tiny_llama(), torch.randint(0, 64, (3, 7))
    before = model(tokens).logits
    assert lorry.methods()["weighted-lora"].fuse == "exact"

    adapter = lorry.attach(model, "weighted-lora", name="mine")
    assert torch.equal(model(tokens).logits, before), "the identity at the start"
    assert adapter.count() == lorry.plan(tiny_llama(), "weighted-lora").trained

    optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-2)
    losses = []
    for _ in range(8):
        loss = model(tokens, labels=tokens).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]

    trained = model(tokens).logits
    adapter.fuse()
    torch.testing.assert_close(model(tokens).logits, trained, atol=1e-5, rtol=1e-4)
    adapter.unfuse()
    adapter.save(tmp_path / "mine")
    other = tiny_llama()
    assert lorry.load(other, tmp_path / "mine").method == adapter.method
    torch.testing.assert_close(other(tokens).logits, trained, atol=1e-6, rtol=1e-5)
    with lorry.rows(model, ["mine", None, {"mine": 1.0}]):
        mixed = model(tokens).logits
    torch.testing.assert_close(mixed[0], trained[0], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(mixed[1], before[1], atol=1e-5, rtol=1e-4)


def test_the_page_counts_its_lines_honestly():
    code = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)[0]
    assert len(code.splitlines()) < 60
