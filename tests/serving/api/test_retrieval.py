"""A retriever beside generation in one server, asked over HTTP."""

from __future__ import annotations

import base64
import struct
from pathlib import Path

import httpx
import pytest
import torch
from serving.api.running import offline, running, serving_of
from torch import nn

import lorry
from lorry import pocket
from lorry.cli.serve import build
from lorry.core.errors import CheckpointError, OptionError
from lorry.serving.http.keys import KeyRule, Keys
from lorry.serving.modes import load_mode, maxsim, save_retriever, switched
from lorry.serving.retrieval import serve_mode

TEXTS = ["banana", "apple pie", "a", "star: moon"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    model, _ = pocket.load()
    adapter = lorry.attach(model, {"method": "lora", "rank": 4}, name="a", seed=3)
    generator = torch.Generator().manual_seed(3)
    for parameter in adapter.parameters():
        parameter.data.add_(torch.randn(parameter.shape, generator=generator), alpha=0.05)
    torch.manual_seed(4)
    path = tmp_path_factory.mktemp("modes") / "search"
    save_retriever(adapter, nn.Linear(model.config.hidden_size, 8), path)
    return path


@pytest.fixture(scope="module")
def server(folder):
    keys = Keys([KeyRule(name=n, key=f"key-of-{n}", key_sha256=None, adapters=a, manage=True)
                 for n, a in (("all", None), ("other", ["math"]))])  # fmt: skip
    with serving_of((folder.parent,), keys) as serving:
        serving.modes["search"] = serve_mode(serving.engine, "search", folder)
        with running(serving) as found:
            yield found


def post(server, path, key="all", **body):
    return httpx.post(server.url + path, json=body, headers={"Authorization": f"Bearer key-of-{key}"}, timeout=60)


def expected(folder, texts):
    """Vectors of each text alone, in a fresh model."""
    model, tokenizer = pocket.load()
    lorry.load(model, folder, name="search", activate=False)
    mode = load_mode(folder, "search")
    with torch.no_grad(), switched(model, mode) as found:
        return [found(torch.tensor([tokenizer(text)["input_ids"]]))[0] for text in texts]


def test_vectors_of_tokens_and_one_for_all(server, folder):
    wanted = expected(folder, TEXTS)
    answer = post(server, "/v1/embeddings", model="search", input=TEXTS, return_multivector=True).json()
    for row, vectors in zip(answer["data"], wanted, strict=True):
        torch.testing.assert_close(torch.tensor(row["embeddings"]), vectors, rtol=0, atol=1e-5)
    assert answer["usage"]["prompt_tokens"] == sum(map(len, wanted))
    one = post(server, "/v1/embeddings", model="search", input=TEXTS).json()
    for row, vectors in zip(one["data"], wanted, strict=True):
        mean = nn.functional.normalize(vectors.mean(0), dim=-1)
        torch.testing.assert_close(torch.tensor(row["embedding"]), mean, rtol=0, atol=1e-5)
    coded = post(server, "/v1/embeddings", model="search", input="a", return_multivector=True, encoding_format="base64")
    raw = base64.b64decode(coded.json()["data"][0]["embeddings"][0])
    torch.testing.assert_close(torch.tensor(struct.unpack("<8f", raw)), wanted[2][0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("path", ["/v1/rerank", "/v2/rerank", "/rerank"])
def test_documents_come_in_the_order_of_maxsim(server, folder, path):
    query, *documents = expected(folder, ["banana", *TEXTS])
    scores = [float(maxsim(query[None], each[None])) / len(query) for each in documents]
    given = [TEXTS[0], {"text": TEXTS[1]}, *TEXTS[2:]]
    answer = post(server, path, model="search", query="banana", documents=given).json()
    assert [each["index"] for each in answer["results"]] == sorted(range(4), key=lambda i: -scores[i])
    for each in answer["results"]:
        assert each["relevance_score"] == pytest.approx(scores[each["index"]], abs=1e-5)
        assert each["document"] == {"text": TEXTS[each["index"]]}
    assert answer["results"][0]["index"] == 0 and answer["results"][0]["relevance_score"] == pytest.approx(1, abs=1e-5)
    few = post(server, path, query="banana", documents=given, top_n=2, return_documents=False).json()
    assert few["results"] == [{k: each[k] for k in ("index", "relevance_score")} for each in answer["results"][:2]]
    assert few["model"] == "search" and few["usage"] == answer["usage"]


def test_generation_beside_it_is_the_bases_own(server):
    prompt = "upper:banana>"
    wanted = offline({}, [prompt], {}, 8)[0]
    for _ in range(2):
        found = post(server, "/v1/completions", model="pocket", prompt=prompt, max_tokens=8, temperature=0).json()
        assert found["choices"][0]["text"] == wanted
        assert post(server, "/v1/rerank", query=prompt, documents=TEXTS).status_code == 200


@pytest.mark.parametrize(
    "path, body, status, says",
    [
        ("/v1/completions", {"model": "search", "prompt": "a"}, 400, "mode of retrieval"),
        ("/v1/completions", {"model": "base+search:0.5", "prompt": "a"}, 400, "mode of retrieval"),
        ("/v1/embeddings", {"model": "base+search:0.5", "input": "a"}, 400, "mode of retrieval"),
        ("/v1/embeddings", {"model": "pocket", "input": "a", "return_multivector": True}, 400, "Only a retriever"),
        ("/v1/rerank", {"model": "pocket", "query": "a", "documents": ["b"]}, 404, "orders no documents"),
        ("/v1/rerank", {"model": "search", "query": "a", "documents": []}, 400, "documents"),
        ("/v1/rerank", {"model": "search", "query": "", "documents": ["b"]}, 400, "query"),
        ("/v1/rerank", {"model": "search", "query": "a", "documents": ["b" * 2000]}, 400, "sees"),
        ("/v1/unload_lora_adapter", {"lora_name": "search"}, 409, "belongs to a mode"),
        ("/v1/load_lora_adapter", {"lora_name": "search", "lora_path": "search"}, 409, "belongs to a mode"),
    ],
)
def test_what_cannot_be(server, path, body, status, says):
    answer = post(server, path, **body)
    assert answer.status_code == status and says in answer.json()["error"]["message"]


def test_keys_have_their_modes(server):
    for path, body in (("/v1/rerank", {"query": "a", "documents": ["b"]}), ("/v1/embeddings", {"input": "a"})):
        answer = post(server, path, key="other", model="search", **body)
        assert answer.status_code == 403 and answer.json()["error"]["code"] == "adapter_not_allowed"
    answer = post(server, "/v1/rerank", key="other", query="a", documents=["b"])
    assert answer.status_code == 400 and "search" not in answer.json()["error"]["message"]


def test_modes_of_the_command_line(folder, shelf):
    own = dict.fromkeys(("keys", "api_key", "template", "name", "adapter", "adapter_dir", "mode", "train"))
    own |= {"base": "pocket", "host": "127.0.0.1", "port": 0, "dtype": "auto", "device": "cpu", "max_body": 4096,
            "max_requests": 4, "max_sessions": 2, "patience": 1.0}  # fmt: skip
    server = build(own | {"mode": [f"find={folder}"]}, {"pages": 64})
    try:
        assert [each.name for each in server.service.engine.adapters()] == ["find"]
        assert server.config.app.state.serving.modes["find"].attention == "bidirectional"
    finally:
        server.service.close()
        server.service.engine.close()
    with pytest.raises(OptionError, match="is taken"):
        build(own | {"mode": [f"pocket={folder}"]}, {"pages": 64})
    with pytest.raises(CheckpointError, match="is no retriever"):
        build(own | {"mode": [f"find={shelf['math']}"]}, {"pages": 64})


def test_a_head_of_another_width_is_refused_and_nothing_is_served(tmp_path):
    model, _ = pocket.load()
    adapter = lorry.attach(model, {"method": "lora", "rank": 2}, name="a")
    save_retriever(adapter, nn.Linear(5, 4), tmp_path / "narrow")
    with serving_of() as serving:
        with pytest.raises(OptionError, match="takes states of 5 numbers"):
            serve_mode(serving.engine, "narrow", tmp_path / "narrow")
        assert serving.engine.adapters() == []
