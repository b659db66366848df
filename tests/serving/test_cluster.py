"""Replicas on Ray Serve, on this machine: where requests go, and what becomes of them when a replica dies."""

import json
import threading
import time
from contextlib import suppress

import psutil
import pytest
from serving.api.running import saved, serving_of

pytest.importorskip("ray.serve")
httpx = pytest.importorskip("httpx")
openai = pytest.importorskip("openai")

from lorry.cli import serve as command  # noqa: E402
from lorry.serving.cluster.deploy import connect, take_down  # noqa: E402
from lorry.serving.request import Request, Sampling  # noqa: E402

OWN = {
    "base": "pocket", "adapter": None, "host": "127.0.0.1", "name": None, "adapter_dir": None, "keys": None,
    "api_key": None, "template": None, "dtype": "auto", "device": "cpu", "max_body": 1 << 20, "max_requests": 64,
    "patience": 5.0, "ray": "local",
}  # fmt: skip


PROMPT = "The"


@pytest.fixture(scope="module")
def shelf(tmp_path_factory):
    """Two adapters in one folder."""
    folder = tmp_path_factory.mktemp("shelf")
    return {name: saved(folder / name, seed) for seed, name in enumerate(("math", "story"), 1)}


@pytest.fixture(scope="module")
def url(shelf):
    """The address of two replicas; every process of Ray ends with the tests, whatever happens."""
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    here = psutil.Process()
    before = set(here.children(recursive=True))
    try:
        connect("local", num_cpus=2, log_to_driver=False)
        own = {**OWN, "adapter": [f"math={shelf['math']}"], "adapter_dir": [shelf["math"].parent], "port": port}
        yield command.start_replicas(own, {"pages": 256}, {"replicas": 2, "replica_cpus": 0.5, "held": 1})
    finally:
        started = set(here.children(recursive=True)) - before
        with suppress(Exception):
            take_down()
        for process in started:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(started, 10)


def ask(url, model="pocket", **fields):
    body = {"model": model, "prompt": PROMPT, "max_tokens": 8, "temperature": 0, **fields}
    return httpx.post(f"{url}/v1/completions", json=body, timeout=60)


def text(answer):
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]["text"]


def test_a_cluster_answers_openais_client_and_sends_requests_where_their_adapter_is(url):
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60) as client:
        assert [model.id for model in client.models.list()] == ["pocket", "math"]
        events = client.completions.create(model="math", prompt=PROMPT, max_tokens=8, temperature=0, stream=True)
        streamed = "".join(event.choices[0].text for event in events if event.choices)
        with pytest.raises(openai.NotFoundError, match="no model 'maths'.*math"):
            client.completions.create(model="maths", prompt=PROMPT)
        with pytest.raises(openai.BadRequestError, match="max_tokens"):
            client.completions.create(model="math", prompt=PROMPT, max_tokens=-1)
    answers = [ask(url, "math") for _ in range(4)]
    assert {text(answer) for answer in answers} == {streamed} != {text(ask(url))}
    assert len({answer.headers["x-lorry-replica"] for answer in answers}) == 1
    assert ask(url, "x" * (1 << 20)).status_code == 413
    assert httpx.get(f"{url}/health").json() == {"status": "ok"}


def test_adapters_are_loaded_into_the_cluster_and_leave_it(url, shelf):
    fields = {"lora_name": "story", "lora_path": "story"}
    loaded = httpx.post(f"{url}/v1/load_lora_adapter", json=fields, timeout=60)
    assert loaded.status_code == 200 and loaded.json()["receipt"]
    assert httpx.post(f"{url}/v1/load_lora_adapter", json=fields, timeout=60).status_code == 409
    # a replica holds one adapter, so each of these makes another one leave
    models = {"story": {"story": 1.0}, "math": {"math": 1.0}, "base+math:0.7+story:-0.3": {"math": 0.7, "story": -0.3}}
    with serving_of() as alone:
        for name, path in shelf.items():
            alone.engine.load(name, path)
        prompt = tuple(alone.engine.tokenizer(PROMPT)["input_ids"])
        sampling = Sampling(max_tokens=8, temperature=0)
        asked = [Request(model, prompt, composition, sampling) for model, composition in models.items()]
        expected = {model: each.text for model, each in zip(models, alone.engine.generate(asked), strict=True)}
    assert len(set(expected.values())) == 3
    for _ in range(2):
        assert {model: text(ask(url, model)) for model in models} == expected
    gone = httpx.post(f"{url}/v1/unload_lora_adapter", json={"lora_name": "story"}, timeout=60)
    assert gone.status_code == 200, gone.text
    for _ in range(4):  # whichever replica answers
        assert ask(url, "story").json()["error"]["code"] == "model_not_found"
    assert text(ask(url, "math")) == expected["math"]


def test_no_request_is_lost_when_a_replica_is_killed_under_load(url):
    expected = text(ask(url, max_tokens=100, ignore_eos=True))
    victim = next(p for p in psutil.Process().children(recursive=True) if "ServeReplica:lorry:Replica" in p.name())
    answers, streams = [], []

    def load():
        answers.extend(ask(url, max_tokens=100, ignore_eos=True) for _ in range(4))

    def stream():
        body = {"model": "pocket", "prompt": PROMPT, "max_tokens": 100, "temperature": 0, "ignore_eos": True}
        with httpx.stream("POST", f"{url}/v1/completions", json={**body, "stream": True}, timeout=60) as answer:
            streams.append((answer.status_code, [line[6:] for line in answer.iter_lines() if line]))

    threads = [threading.Thread(target=target) for target in (*[load] * 6, *[stream] * 4)]
    for thread in threads:
        thread.start()
    while not answers:
        time.sleep(0.01)
    victim.kill()
    for thread in threads:
        thread.join(90)
    assert len(answers) == 24 and len(streams) == 4
    assert {text(answer) for answer in answers} == {expected}  # asked again of the replica that lives
    for status, lines in streams:
        last = json.loads(lines[-1]) if lines[-1] != "[DONE]" else None
        assert status == 200 and (last is None or last["error"]["code"] == "replica_lost")
        if last is None:
            assert "".join(c["text"] for line in lines[:-1] for c in json.loads(line)["choices"]) == expected
    assert text(ask(url)) == expected[: len(text(ask(url)))]
