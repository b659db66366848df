"""What OpenAI's own client gets for texts and conversations."""

import asyncio

import openai
import pytest
from serving.api.running import offline

PROMPTS = ["reverse:abcde>", "upper:lorry>", "swap:abcd>"]


@pytest.mark.parametrize(
    ("model", "composition"),
    [
        ("pocket", {}),
        ("base", {}),
        ("math", {"math": 1.0}),
        ("base+math:0.7+story:0.3", {"math": 0.7, "story": 0.3}),
        ("pocket+story:0.5", {"story": 0.5}),
        ("math+story:-0.25", {"math": 1.0, "story": -0.25}),
    ],
)
def test_answers_are_those_of_the_adapters_offline(client, shelf, model, composition):
    answer = client.completions.create(model=model, prompt=PROMPTS, max_tokens=6, temperature=0)
    assert [choice.text for choice in answer.choices] == offline(shelf, PROMPTS, composition, 6)
    assert answer.model == model and [choice.index for choice in answer.choices] == [0, 1, 2]


def test_usage_and_reasons(client):
    ended = client.completions.create(model="pocket", prompt="reverse:abcde>", max_tokens=20, temperature=0)
    assert ended.choices[0].text == "edcba" and ended.choices[0].finish_reason == "stop"
    assert (ended.usage.prompt_tokens, ended.usage.completion_tokens, ended.usage.total_tokens) == (14, 6, 20)
    short = client.completions.create(model="pocket", prompt="reverse:abcde>", max_tokens=2, temperature=0)
    assert short.choices[0].text == "ed" and short.choices[0].finish_reason == "length"


def test_a_stream_is_the_answer_in_pieces(client):
    asked = {"model": "math", "prompt": ["reverse:abcde>", "upper:xyz>"], "max_tokens": 6, "temperature": 0}
    whole = client.completions.create(**asked)
    texts, usage = {0: "", 1: ""}, None
    for piece in client.completions.create(**asked, stream=True, stream_options={"include_usage": True}):
        for choice in piece.choices:
            texts[choice.index] += choice.text
        usage = piece.usage or usage
    assert list(texts.values()) == [choice.text for choice in whole.choices]
    assert usage.completion_tokens == whole.usage.completion_tokens


def test_a_conversation_and_its_stream(client):
    asked = {"model": "pocket", "messages": [{"role": "user", "content": "upper:abc"}], "temperature": 0}
    answer = client.chat.completions.create(**asked)
    assert answer.choices[0].message.content == "ABC" and answer.choices[0].finish_reason == "stop"
    pieces = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    deltas = [piece.choices[0].delta for piece in pieces if piece.choices]
    assert deltas[0].role == "assistant" and "".join(delta.content or "" for delta in deltas) == "ABC"
    assert pieces[-1].usage.total_tokens == answer.usage.total_tokens and not pieces[-1].choices
    parts = [{"role": "user", "content": [{"type": "text", "text": "upper:"}, {"type": "text", "text": "abc"}]}]
    assert client.chat.completions.create(**asked | {"messages": parts}).choices[0].message.content == "ABC"


def test_many_clients_at_once_get_what_each_gets_alone(server):
    async def all_of_them(asked):
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="x", max_retries=0) as many:
            answers = [many.completions.create(**each) for each in asked]
            return [answer.choices[0].text for answer in await asyncio.gather(*answers)]

    asked = [
        {"model": model, "prompt": prompt, "max_tokens": 6, "temperature": temperature, "seed": 3}
        for model in ("pocket", "math", "story", "base+math:0.5+story:0.5")
        for prompt in PROMPTS
        for temperature in (0, 1)
    ]
    together = asyncio.run(all_of_them(asked))
    assert together == [asyncio.run(all_of_them([each]))[0] for each in asked]


def test_models_are_listed(client):
    assert [model.id for model in client.models.list()] == ["pocket", "math", "story"]
    assert client.models.retrieve("math").id == "math"
    assert client.models.retrieve("base+math:0.5").id == "base+math:0.5"
    with pytest.raises(openai.NotFoundError, match="Did you mean 'story'"):
        client.models.retrieve("stori")


def test_vectors(client, shelf):
    import torch

    import lorry
    from lorry import pocket

    model, tokenizer = pocket.load()
    lorry.load(model, shelf["math"], name="math")
    texts = ["reverse:abc>", "upper:lorry>", "a"]
    expected = []
    for text in texts:
        ids = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])
        with torch.no_grad():
            expected.append(model.model(ids).last_hidden_state[0])
    means = torch.nn.functional.normalize(torch.stack([states.mean(0) for states in expected]), dim=-1)
    found = client.embeddings.create(model="math", input=texts)  # the client asks for base64
    torch.testing.assert_close(torch.tensor([each.embedding for each in found.data]), means, atol=1e-5, rtol=1e-4)
    plain = client.embeddings.create(
        model="math", input=texts, encoding_format="float", extra_body={"pooling": "last", "normalize": False}
    )
    lasts = torch.stack([states[-1] for states in expected])
    torch.testing.assert_close(torch.tensor([each.embedding for each in plain.data]), lasts, atol=1e-4, rtol=1e-4)
    base = client.embeddings.create(model="pocket", input=texts[0], encoding_format="float")
    assert base.data[0].embedding != plain.data[0].embedding and base.usage.prompt_tokens == len(texts[0])
