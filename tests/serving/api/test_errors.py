"""Errors have OpenAI's shape and the right status, and say what to do."""

import http.client
import json

import httpx
import openai
import pytest
from serving.api.running import running, serving_of

CHAT = {"messages": [{"role": "user", "content": "a"}]}
TEXT = {"prompt": "a"}
BAD = [
    ("/v1/completions", TEXT | {"model": "stori"}, 404, "model", "Did you mean 'story'"),
    ("/v1/completions", TEXT | {"model": "base+nope:0.5"}, 404, "model", "GET /v1/models"),
    ("/v1/completions", TEXT | {"model": "no/such"}, 404, "model", "no/such"),
    ("/v1/completions", TEXT | {"model": "base+math:much"}, 400, "model", "no weight"),
    ("/v1/completions", TEXT | {"model": "base+math:nan"}, 400, "model", "no weight"),
    ("/v1/completions", TEXT | {"model": "math:-1e300"}, 400, "model", "no weight"),
    ("/v1/completions", TEXT | {"model": "math+math"}, 400, "model", "twice"),
    ("/v1/completions", {}, 400, "prompt", "required"),
    ("/v1/completions", {"prompt": ""}, 400, None, "at least one token"),
    ("/v1/completions", {"prompt": [5000]}, 400, None, "5000"),
    ("/v1/completions", TEXT | {"temperatur": 1}, 400, "temperatur", "Did you mean 'temperature'"),
    ("/v1/completions", TEXT | {"temperature": -1}, 400, "temperature", "greater than or equal to 0"),
    ("/v1/completions", TEXT | {"max_tokens": 1000}, 400, None, "context has 256 tokens"),
    ("/v1/completions", TEXT | {"n": 2, "best_of": 1}, 400, None, "best_of"),
    ("/v1/completions", TEXT | {"best_of": 2, "stream": True}, 400, None, "stream"),
    ("/v1/completions", {"prompt": ["a"] * 200, "n": 2}, 400, None, "256 sequences"),
    ("/v1/completions", TEXT | {"logit_bias": {"x": 1}}, 400, None, "token numbers"),
    ("/v1/completions", TEXT | {"stop": ""}, 400, None, "stop text"),
    ("/v1/completions", TEXT | {"guided_json": {}, "guided_regex": "a"}, 400, None, "one thing only"),
    ("/v1/completions", TEXT | {"guided_json": "{"}, 400, None, "guided_json"),
    ("/v1/completions", {"prompt": "\ud800"}, 400, None, "Unicode"),
    ("/v1/chat/completions", {}, 400, "messages", "required"),
    ("/v1/chat/completions", {"messages": []}, 400, "messages", "at least 1"),
    ("/v1/chat/completions", {"messages": [{"role": "x"}]}, 400, "messages.0.role", "system"),
    ("/v1/chat/completions", CHAT | {"top_logprobs": 2}, 400, None, "logprobs: true"),
    ("/v1/chat/completions", CHAT | {"tool_choice": "required"}, 400, None, "has no tools"),
    ("/v1/chat/completions", CHAT | {"chat_template_kwargs": {"chat_template": "x"}}, 400, None, "chat_template"),
    ("/v1/chat/completions", CHAT | {"response_format": {"type": "json_schema"}}, 400, None, "needs json_schema"),
    ("/v1/embeddings", {"input": []}, 400, None, "at least 1"),
    ("/v1/embeddings", {"input": "a", "model": "stori"}, 404, "model", "Did you mean 'story'"),
    ("/v1/embeddings", {"input": "a", "dimensions": 3}, 400, None, "dimensions"),
    ("/v1/embeddings", {"input": [[5000]]}, 400, None, "5000"),
    ("/v1/rerank", {"query": "a", "documents": ["b"]}, 501, None, "no head"),
    ("/detokenize", {"tokens": [5000]}, 400, None, "5000"),
    ("/tokenize", {}, 400, None, "either prompt"),
    ("/nothing", {}, 404, None, "/nothing"),
    ("/v1/models", {}, 405, None, "POST"),
]


@pytest.mark.parametrize(("path", "body", "status", "param", "says"), BAD)
def test_what_is_wrong_is_said(server, path, body, status, param, says):
    answer = httpx.post(server.url + path, content=json.dumps(body), headers={"Content-Type": "application/json"})
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert says in error["message"] and (param is None or error["param"] == param)


def test_bodies_that_are_no_json(server):
    def post(content, **headers):
        return httpx.post(f"{server.url}/v1/completions", content=content, headers=headers)

    as_json = {"Content-Type": "application/json"}
    for content in (
        b"{",
        b"",
        b"\xff\xfe",
        b"[1]",
        b'"a"',
        b"null",
        b"[" * 100_000,
        b'{"prompt": ' + b"9" * 6000 + b"}",
    ):
        answer = post(content, **as_json)
        assert answer.status_code == 400 and answer.json()["error"]["message"], content[:20]
    assert "Content-Type" in post(b'{"prompt": "a"}').json()["error"]["message"]


def test_a_client_sees_the_classes_of_its_library(client):
    with pytest.raises(openai.NotFoundError, match="Did you mean 'math'"):
        client.completions.create(model="maht", prompt="a")
    with pytest.raises(openai.BadRequestError, match="context"):
        client.completions.create(model="math", prompt="a" * 300)
    with pytest.raises(openai.BadRequestError, match="context"):
        list(client.completions.create(model="math", prompt="a" * 300, stream=True))


def test_bodies_that_are_too_large_are_not_read(shelf):
    with serving_of() as serving, running(serving, most_bytes=2000, hosts={"127.0.0.1"}) as small:
        url = f"{small.url}/v1/completions"
        assert httpx.post(url, json={"prompt": "a" * 100}).status_code == 200
        for content in (b" " * 3000, (b" " * 1000 for _ in range(3))):  # with and without a length
            answer = httpx.post(url, content=content, headers={"Content-Type": "application/json"})
            assert answer.status_code == 413 and "2000" in answer.json()["error"]["message"]
        foreign = httpx.get(f"{small.url}/v1/models", headers={"Host": "evil.example"})
        assert foreign.status_code == 403 and foreign.json()["error"]["code"] == "host_not_allowed"


def test_a_client_that_goes_away_frees_what_it_had(server):
    stats, before = server.serving.engine.stats, server.serving.engine.stats().finished
    for stream in (True, False):
        host, port = server.url.removeprefix("http://").split(":")
        line = http.client.HTTPConnection(host, int(port), timeout=30)
        body = {"prompt": "vowels:", "max_tokens": 240, "ignore_eos": True, "stream": stream}
        decoded = stats().tokens_decoded
        line.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
        while stats().tokens_decoded < decoded + 3:
            pass
        line.close()
        while not server.serving.engine.idle:
            pass
        assert stats().tokens_decoded < decoded + 240
    assert stats().finished == before + 2 and server.serving.service.under_way == 0


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_while_it_waits_does_not_run(stream):
    with serving_of(pages=20) as serving, running(serving) as small:
        host, port = small.url.removeprefix("http://").split(":")
        lines = [http.client.HTTPConnection(host, int(port), timeout=60) for _ in range(2)]
        body = {"prompt": "vowels:", "max_tokens": 240, "ignore_eos": True, "stream": stream}
        for count, line in enumerate(lines, 1):  # the second finds no room beside the first
            line.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
            while serving.service.under_way < count:
                pass
        lines[1].close()
        while serving.service.under_way > 1:
            pass
        assert serving.engine.stats().tokens_decoded < 240
        assert lines[0].getresponse().status == 200
        lines[0].close()


def test_metrics_count_what_happened(server, client):
    client.completions.create(model="pocket", prompt="reverse:abc>", max_tokens=4, temperature=0)
    text = httpx.get(f"{server.url}/metrics").text
    lines = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert float(lines['lorry_http_answers_total{path="/v1/completions",status="200"}']) >= 1
    assert float(lines['lorry_tokens_total{kind="prompt"}']) >= 12
    assert float(lines["lorry_engine_pages"]) == server.serving.engine.stats().pages
    assert float(lines["lorry_time_to_first_token_seconds_count"]) >= 1
    assert httpx.get(f"{server.url}/health").json() == {"status": "ok"}


def test_clients_close_idle_connections_before_the_server_does(server):
    assert server.server.config.timeout_keep_alive > httpx.Limits().keepalive_expiry > 0
