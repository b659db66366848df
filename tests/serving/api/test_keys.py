"""Who may ask for what, and how much of it."""

import hashlib
import logging

import httpx
import openai
import pytest
from serving.api.running import running, serving_of

from lorry.core.errors import OptionError
from lorry.serving.http.bodies import ChatBody
from lorry.serving.http.errors import ApiError
from lorry.serving.http.keys import Bucket, KeyRule, Keys
from lorry.serving.http.server import check_exposed
from lorry.serving.http.wishes import length_of

FILE = """
keys:
  - name: alice
    key: alices-secret
    adapters: [math, "st*"]
    base: false
    max_tokens: 4
  - name: bob
    key_sha256: {digest}
    manage: true
    adapters: [math, other, new]
    concurrent: 2
    requests_per_minute: 3
"""


def rule(**limits):
    return KeyRule(name="x", key="secret-of-x", key_sha256=None, **limits)


class Clock:
    """A clock that is set by hand."""

    now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "keys.yaml"
    path.write_text(FILE.format(digest=hashlib.sha256(b"bobs-secret").hexdigest()))
    return path


def test_keys_over_http(file, shelf, caplog):
    caplog.set_level(logging.DEBUG)
    with serving_of((shelf["math"].parent,), Keys.read(file)) as serving, running(serving) as server:
        serving.engine.load("math", shelf["math"])
        serving.engine.load("other", shelf["story"])

        def client(key):
            return openai.OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0)

        with client("wrong-secret") as nobody, pytest.raises(openai.AuthenticationError, match="not known"):
            nobody.models.list()
        assert httpx.get(f"{server.url}/v1/models").status_code == 401
        assert httpx.get(f"{server.url}/metrics").status_code == 401
        assert httpx.post(f"{server.url}/v1/completions", content=b"{").status_code == 401
        assert httpx.get(f"{server.url}/health").status_code == 200
        with client("alices-secret") as alice:
            assert [model.id for model in alice.models.list()] == ["math"]
            said = alice.completions.create(
                model="math", prompt="a", extra_body={"ignore_eos": True, "max_tokens": None}
            )
            assert said.usage.completion_tokens == 4
            for model in ("other", "nowhere", "pocket", "math+other:0.1"):
                with pytest.raises(openai.PermissionDeniedError, match="may not use"):
                    alice.completions.create(model=model, prompt="a")
            with pytest.raises(openai.NotFoundError) as absent:
                alice.completions.create(model="story", prompt="a")
            assert "other" not in str(absent.value)
            with pytest.raises(openai.BadRequestError, match="4 tokens at most"):
                alice.completions.create(model="math", prompt="a", max_tokens=5)
            load = {"lora_name": "new", "lora_path": "story"}
            refused = httpx.post(f"{server.url}/v1/load_lora_adapter", json=load, headers=dict(alice.auth_headers))
            assert refused.status_code == 403
        with client("bobs-secret") as bob:
            answer = httpx.post(f"{server.url}/v1/load_lora_adapter", json=load, headers=dict(bob.auth_headers))
            assert answer.status_code == 200, answer.text
            for path in ("load", "unload"):
                foreign = httpx.post(
                    f"{server.url}/v1/{path}_lora_adapter",
                    json={"lora_name": "foreign"} | ({"lora_path": "story"} if path == "load" else {}),
                    headers=dict(bob.auth_headers),
                )
                assert foreign.status_code == 403
            with pytest.raises(openai.BadRequestError, match="2 under way"):
                bob.completions.create(model="pocket", prompt="a", n=3)
            for _ in range(3):
                bob.completions.create(model="pocket", prompt="a", n=2, max_tokens=1)
            with pytest.raises(openai.RateLimitError, match="3 requests") as limited:
                bob.completions.create(model="pocket", prompt="a", max_tokens=1)
            assert 1 <= int(limited.value.response.headers["retry-after"]) <= 21
    assert "secret" not in caplog.text


def test_rates_flow_back():
    clock = Clock()
    bucket = Bucket(60, clock)
    bucket.take(60)
    assert bucket.wait(1) == 1
    clock.now = 30
    assert bucket.level() == 30 and bucket.wait(45) == 15
    clock.now = 500
    assert bucket.level() == 60


def test_tokens_that_were_not_used_go_back():
    clock = Clock()
    keys = Keys([rule(tokens_per_minute=100)], clock)
    holder = keys.holder("Bearer secret-of-x")
    grant = holder.take(1, 80)
    with pytest.raises(ApiError) as refused:
        holder.take(1, 30)
    assert refused.value.status == 429 and refused.value.retry_after == 6
    grant.used = 20
    grant.end()
    grant.end()
    assert holder.take(1, 80)
    with pytest.raises(ApiError) as never:
        holder.take(1, 101)
    assert never.value.retry_after is None and "Ask for less" in never.value.message


def test_an_answer_without_a_length_keeps_to_all_limits():
    body = ChatBody.model_validate({"messages": [{"role": "user", "content": "x"}]})
    lengths = {}
    for limits in ({}, {"tokens_per_minute": 100}, {"max_tokens": 7}, {"tokens_per_minute": 5}):
        lengths[str(limits)] = length_of(body, 10, 256, Keys([rule(**limits)]).holder("Bearer secret-of-x"), None)
    assert list(lengths.values()) == [246, 90, 7, 1]


def test_sequences_under_way_are_counted_until_they_end():
    holder = Keys([rule(concurrent=3)]).holder("bearer  secret-of-x")
    first = holder.take(2, 10)
    with pytest.raises(ApiError) as refused:
        holder.take(2, 10)
    assert refused.value.status == 429
    first.end()
    assert holder.take(3, 10)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("keys: [", "no valid YAML"),
        ("keys: []", "keys"),
        ("keys: [{name: a}]", "either key or key_sha256"),
        ("keys: [{name: a, key: short-se, key_sha256: x}]", "key_sha256"),
        ("keys: [{name: a, key: a-long-secret, adapter: [b]}]", "adapter"),
        ("keys: [{name: a, key: a-long-secret}, {name: a, key: another-secret}]", "same name"),
        ("keys: [{name: a, key: a-long-secret}, {name: b, key: a-long-secret}]", "same key"),
    ],
)
def test_files_that_are_wrong_say_where_and_never_the_key(tmp_path, text, says):
    path = tmp_path / "keys.yaml"
    path.write_text(text)
    with pytest.raises(OptionError, match=says) as wrong:
        Keys.read(path)
    assert "secret" not in str(wrong.value)
    assert "secret" not in repr(rule())


def test_other_addresses_than_loopback_need_keys():
    for host in ("127.0.0.1", "localhost", "::1", "127.1.2.3"):
        check_exposed(host, keys=False)
    for host in ("0.0.0.0", "::", "10.0.0.1", "example.com"):
        with pytest.raises(OptionError, match="needs keys"):
            check_exposed(host, keys=False)
        check_exposed(host, keys=True)
