"""Bodies that are shaped like the schemas and filled with anything never make the server fail."""

import asyncio

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from serving.api.running import serving_of

from lorry.serving.http import bodies
from lorry.serving.http.app import create_app

PATHS = {
    "/v1/completions": bodies.CompletionBody,
    "/v1/chat/completions": bodies.ChatBody,
    "/v1/embeddings": bodies.EmbeddingBody,
    "/v1/rerank": bodies.RerankBody,
    "/tokenize": bodies.TokenizeBody,
    "/detokenize": bodies.DetokenizeBody,
    "/v1/load_lora_adapter": bodies.LoadBody,
    "/v1/unload_lora_adapter": bodies.UnloadBody,
}
TEXTS = st.one_of(
    st.text(max_size=12),
    st.sampled_from(
        ["", "math", "base+math:0.5", "base+:", "pocket", "../x", "\x00", "\ud800", "{", "[0-9]+", "(", "a" * 300]
    ),
)
NUMBERS = st.one_of(
    st.integers(-3, 40),
    st.sampled_from([2**31, -(2**63), 2**64, 10**400, 1e308, 0.5, -0.0, float("nan"), float("inf")]),
)
ANYTHING = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=6,
)
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
#: Values that get past the first check, so that what comes after it is tried, too.
LIKELY = {
    "messages": st.lists(
        st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant", "tool", "system"]), "content": TEXTS}),
        min_size=1,
        max_size=3,
    ),
    "prompt": TEXTS | st.lists(st.integers(0, 120), min_size=1, max_size=4) | st.lists(TEXTS, min_size=1, max_size=3),
    "input": TEXTS | st.lists(TEXTS, min_size=1, max_size=3),
    "model": st.sampled_from([None, "pocket", "math", "base+math:0.5", "math:1e300", "none"]),
    "max_tokens": st.integers(0, 4),
    "n": st.integers(1, 3),
    "tools": st.lists(st.just(TOOL), max_size=2),
    "tool_choice": st.sampled_from(["auto", "none", "required", {"type": "function", "function": {"name": "f"}}]),
    "guided_json": st.dictionaries(st.sampled_from(["type", "enum", "$ref", "properties"]), ANYTHING, max_size=2),
    "guided_grammar": TEXTS | st.sampled_from(['root ::= root "a"', 'root ::= ("a"*)*', 'root ::= "\u00e9"']),
    "guided_regex": TEXTS | st.sampled_from(["(a{1,99}){1,99}", "(?=a)b", "\u00e9+", ""]),
    "temperature": st.sampled_from([0, 1, 1000, 1e-300]),
    "top_p": st.sampled_from([0, 1e-300, 0.5, 1]),
    "frequency_penalty": st.sampled_from([-2, 2]),
    "repetition_penalty": st.sampled_from([1e-300, 1000]),
    "min_tokens": st.integers(0, 4),
    "stop": TEXTS | st.lists(TEXTS, max_size=2),
    "seed": st.sampled_from([0, -(2**63), 2**63 - 1]),
    "logprobs": st.sampled_from([0, 2, 20, True]),
    "prompt_logprobs": st.integers(0, 20),
    "echo": st.booleans(),
    "deadline": st.sampled_from([1e-9, 1e9, 1e300]),
    "logit_bias": st.dictionaries(st.integers(-2, 120).map(str), st.integers(-100, 100), max_size=2),
    "tokens": st.lists(st.integers(0, 120), max_size=5),
    "stream": st.booleans(),
}


def body_of(model):
    fields = {name: st.one_of([LIKELY.get(name, ANYTHING)] * 3 + [ANYTHING]) for name in model.model_fields}
    needed = {name: LIKELY.get(name, TEXTS) for name, field in model.model_fields.items() if field.is_required()}
    needed |= {"max_tokens": LIKELY["max_tokens"]} if "max_tokens" in fields else {}
    some = st.lists(st.sampled_from(sorted(fields)), max_size=4, unique=True).flatmap(
        lambda names: st.fixed_dictionaries({name: fields[name] for name in names})
    )
    return st.tuples(st.fixed_dictionaries(needed), some).map(lambda pair: {**pair[0], **pair[1]}) | ANYTHING


@pytest.fixture(scope="module")
def post(shelf):
    """Post to an app without a network between; errors that nobody foresaw are raised here."""
    import json

    loop = asyncio.new_event_loop()
    with serving_of((shelf["math"].parent,)) as serving:
        serving.engine.load("math", shelf["math"])
        transport = httpx.ASGITransport(create_app(serving))
        client = httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1")

        def call(path, body):
            content = json.dumps(body)
            return loop.run_until_complete(
                client.post(path, content=content, headers={"Content-Type": "application/json"})
            )

        yield call
        assert serving.service.under_way == 0
        loop.run_until_complete(client.aclose())
        loop.close()


@pytest.mark.parametrize("path", PATHS)
def test_no_body_makes_the_server_fail(post, path):
    @given(body_of(PATHS[path]))
    @settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
    def answers(body):
        answer = post(path, body)
        assert answer.status_code in (200, 400, 403, 404, 409, 501) or "dropped" in answer.text, (
            answer.status_code,
            answer.text,
        )
        assert "server_error" not in answer.text  # neither in a stream
        if answer.status_code != 200:
            assert answer.json()["error"]["message"]

    answers()
