"""Sampling, log-probabilities and forms that answers keep to, as OpenAI's own client asks for them."""

import httpx
import pytest


def test_echo_with_log_probabilities(client, shelf):
    import torch

    import lorry
    from lorry import pocket

    model, tokenizer = pocket.load()
    lorry.load(model, shelf["math"], name="math")
    text = "reverse:abc>cba"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        expected = torch.log_softmax(model(torch.tensor([ids])).logits[0], -1)
    for prompt in (text, ids):
        answer = client.completions.create(
            model="math", prompt=prompt, max_tokens=0, echo=True, logprobs=2, temperature=0
        )
        choice, report = answer.choices[0], answer.choices[0].logprobs
        assert choice.text == text and report.tokens == list(text) and report.text_offset == list(range(len(text)))
        assert report.token_logprobs[0] is None and report.top_logprobs[0] is None
        found = torch.tensor(report.token_logprobs[1:])
        torch.testing.assert_close(found, expected[range(len(ids) - 1), ids[1:]], atol=1e-4, rtol=1e-4)
        for place, top in enumerate(report.top_logprobs[1:]):
            likeliest = tokenizer.decode([int(expected[place].argmax())])
            assert max(top, key=top.get) == likeliest and list(text)[place + 1] in top
        assert answer.usage.completion_tokens == 0


def test_log_probabilities_of_a_chat(client):
    answer = client.chat.completions.create(
        model="pocket",
        messages=[{"role": "user", "content": "upper:abc"}],
        temperature=0,
        logprobs=True,
        top_logprobs=3,
    )
    report = answer.choices[0].logprobs.content
    assert [each.token for each in report] == ["A", "B", "C", "\n"]
    assert all(len(each.top_logprobs) == 3 and each.top_logprobs[0].token == each.token for each in report)
    assert all(each.logprob == each.top_logprobs[0].logprob <= 0 and each.bytes == [ord(each.token)] for each in report)


def test_samples_seeds_and_the_best(client):
    asked = {"model": "pocket", "prompt": "vowels:", "max_tokens": 8, "temperature": 1.5}
    several = client.completions.create(**asked, n=4, seed=5)
    texts = [choice.text for choice in several.choices]
    assert len(texts) == 4 and len(set(texts)) > 1 and several.usage.prompt_tokens == 7
    assert [c.text for c in client.completions.create(**asked, n=4, seed=5).choices] == texts
    scored = client.completions.create(**asked, n=4, seed=5, logprobs=0)
    mean = [sum(c.logprobs.token_logprobs) / len(c.logprobs.token_logprobs) for c in scored.choices]
    best = client.completions.create(**asked, n=2, best_of=4, seed=5)
    order = sorted(range(4), key=lambda place: -mean[place])
    assert [choice.text for choice in best.choices] == [texts[place] for place in order[:2]]
    assert best.usage.completion_tokens == several.usage.completion_tokens


def tokens_of(server, text):
    return httpx.post(f"{server.url}/tokenize", json={"prompt": text}).json()["tokens"]


def test_sampling_options_reach_the_engine(client, server):
    asked = {"model": "pocket", "prompt": "reverse:abcde>", "max_tokens": 8}

    def said(**options):
        return client.completions.create(**asked, **options).choices[0].text

    assert said(temperature=0, stop=["cb", "x"]) == "ed"
    assert said(temperature=0, stop="d") == "e"
    for narrow in ({"top_k": 1}, {"min_p": 1.0}):
        assert said(temperature=9, extra_body=narrow) == "edcba"
    assert said(temperature=9, top_p=0) == "edcba"
    assert said(temperature=0, extra_body={"repetition_penalty": 20.0}) != "edcba"
    on = client.completions.create(**asked, temperature=0, extra_body={"ignore_eos": True})
    assert on.usage.completion_tokens == 8 and on.choices[0].finish_reason == "length"
    held = client.completions.create(**asked, temperature=0, extra_body={"min_tokens": 7})
    assert held.usage.completion_tokens >= 7
    ended = client.completions.create(
        **asked, temperature=0, extra_body={"stop_token_ids": [tokens_of(server, "c")[0]]}
    )
    assert ended.usage.completion_tokens == 3


def test_bias_moves_the_choice(client, server):
    token = tokens_of(server, "q")[0]
    answer = client.completions.create(
        model="pocket", prompt="reverse:abcde>", max_tokens=4, temperature=0, logit_bias={str(token): 100}
    )
    assert answer.choices[0].text == "qqqq"


def test_answers_that_must_keep_to_a_form(client):
    import json

    schema = {
        "type": "object",
        "properties": {"n": {"type": "integer", "minimum": 0, "maximum": 9}, "on": {"type": "boolean"}},
        "required": ["n", "on"],
        "additionalProperties": False,
    }
    asked = {"model": "pocket", "messages": [{"role": "user", "content": "upper:abc"}], "seed": 1, "max_tokens": 60}
    kept = client.chat.completions.create(
        **asked, response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    )
    found = json.loads(kept.choices[0].message.content)
    assert set(found) == {"n", "on"} and found["n"] in range(10) and found["on"] in (True, False)
    same = client.chat.completions.create(**asked, extra_body={"guided_json": schema})
    assert same.choices[0].message.content == kept.choices[0].message.content
    one = client.completions.create(model="pocket", prompt="x", extra_body={"guided_choice": ["yes", 'n"o']}, seed=2)
    assert one.choices[0].text in ("yes", 'n"o')
    digits = client.completions.create(model="pocket", prompt="x", extra_body={"guided_regex": "[0-9]{3}"}, seed=2)
    assert len(digits.choices[0].text) == 3 and digits.choices[0].text.isdigit()


TOOLS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "parameters": {
                "type": "object",
                "properties": {"digit": {"type": "integer", "minimum": 0, "maximum": 9}},
                "required": ["digit"],
                "additionalProperties": False,
            },
        },
    }
    for name in ("add", "find")
]


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "find"}}])
def test_a_call_that_is_wanted_comes(client, choice):
    import json

    asked = {
        "model": "pocket",
        "messages": [{"role": "user", "content": "upper:abc"}],
        "tools": TOOLS,
        "tool_choice": choice,
        "max_tokens": 80,
        "seed": 4,
    }
    answer = client.chat.completions.create(**asked).choices[0]
    (call,) = answer.message.tool_calls
    assert answer.finish_reason == "tool_calls" and answer.message.content is None
    assert call.function.name in (("add", "find") if choice == "required" else ("find",))
    assert json.loads(call.function.arguments)["digit"] in range(10)
    deltas = [piece.choices[0] for piece in client.chat.completions.create(**asked, stream=True)]
    (streamed,) = [each for delta in deltas for each in delta.delta.tool_calls or ()]
    assert (streamed.function.name, streamed.function.arguments) == (call.function.name, call.function.arguments)
    assert deltas[-1].finish_reason == "tool_calls"
    assert not any(delta.delta.content for delta in deltas)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"logit_bias": {"9999": 1}}, "9999"),
        ({"extra_body": {"guided_regex": "("}}, "regular expression"),
        ({"extra_body": {"guided_regex": "\u00e9+"}}, "cannot spell"),
        ({"extra_body": {"guided_grammar": "root ::= root root"}}, "cannot spell"),
        ({"extra_body": {"guided_json": {"$ref": "#"}}}, "cannot spell"),
    ],
)
def test_what_the_engine_refuses_is_the_clients_fault(client, options, says):
    import openai

    with pytest.raises(openai.BadRequestError, match=says):
        client.completions.create(model="pocket", prompt="a", **options)
