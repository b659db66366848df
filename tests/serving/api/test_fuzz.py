"""Bodies that are shaped like the schemas and filled with anything never make the server fail."""

import asyncio
from itertools import count

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from serving.api.anything import ANYTHING, TEXTS, body_of
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
    "/v1/sessions": bodies.SessionBody,
    "/v1/sessions/ID/append": bodies.AppendBody,
    "/v1/sessions/ID/turn": bodies.TurnBody,
}
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
    "roles": st.dictionaries(
        st.sampled_from(["planner", "critic"]) | TEXTS,
        st.sampled_from([None, "pocket", "math", "base+math:0.5"]),
        max_size=3,
    ),
    "role": st.sampled_from(["planner", "critic", "nobody"]),
    "policy": st.sampled_from(["non-shared", "full-shared", "base-shared", "base-lowrank-shared", "base-lr-shared"]),
}


@pytest.fixture(scope="module")
def post(shelf):
    """Post to an app without a network between; errors that nobody foresaw are raised here."""
    import json

    loop, opened, calls = asyncio.new_event_loop(), [], count(1)
    with serving_of((shelf["math"].parent,)) as serving:
        serving.engine.load("math", shelf["math"])
        transport = httpx.ASGITransport(create_app(serving))
        client = httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1")

        def call(path, body):
            if "/ID/" in path:  # one that is there, and new from time to time
                if not opened or next(calls) % 8 == 0:
                    if "math" not in serving.names():  # unloaded by another body
                        serving.engine.load("math", shelf["math"])
                    begun = call("/v1/sessions", {"roles": {"planner": "math", "critic": None}, "policy": "non-shared"})
                    assert begun.status_code == 200, begun.text
                    opened[:] = [begun.json()["id"]]
                path = path.replace("ID", opened[0])
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
    @given(body_of(PATHS[path], LIKELY))
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
