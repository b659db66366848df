"""What the engine answers is what the model answers to each request alone."""

import pytest
from serving.tiny_engines import adapt, alone, engine, prompt, request, tiny

FAMILIES = ["llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3", "gpt2"]


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_are_those_of_generate(family):
    model = tiny(family)
    adapt(model, "a")
    adapt(model, "b", {"method": "lora", "rank": 3}, seed=2)
    asked = [
        request("0", prompt(9), None),
        request("1", prompt(3), "a"),
        request("2", prompt(14), {"a": 0.7, "b": 0.4}),
        request("3", prompt(1), "b", most=12),
        request("4", prompt(9), "a", most=1),
    ]
    expected = [alone(model, each) for each in asked]
    assert len(set(expected)) == len(expected)
    found = engine(model, max_batch_tokens=12, max_running=4).generate(asked)
    assert [each.tokens for each in found] == expected
    assert [each.finish for each in found] == ["length"] * len(asked)


def test_a_base_without_adapters():
    model = tiny()
    asked = [request(str(n), prompt(n)) for n in (1, 5, 20)]
    expected = [alone(model, each) for each in asked]
    assert [each.tokens for each in engine(model).generate(asked)] == expected
