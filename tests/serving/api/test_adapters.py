"""Adapters loaded, exchanged and unloaded over HTTP, from allowed folders alone."""

import os

import httpx
import pytest
from serving.api.running import offline, running, saved, serving_of


@pytest.fixture(scope="module")
def loading(shelf, tmp_path_factory):
    """A server with nothing loaded, which loads from a folder of its own with links into and out of it."""
    allowed, outside = tmp_path_factory.mktemp("allowed"), tmp_path_factory.mktemp("outside")
    os.symlink(saved(allowed / "good", 1), allowed / "inner")
    os.symlink(saved(outside / "stolen", 2), allowed / "link")
    halved = allowed / "halved"
    halved.mkdir()
    for file in (outside / "stolen").iterdir():
        os.symlink(file, halved / file.name)
    (allowed / "empty").mkdir()
    with serving_of((allowed,)) as serving, running(serving) as server:
        yield server, allowed, outside


def post(server, path, **body):
    return httpx.post(server.url + path, json=body, timeout=60)


def said(server, model):
    answer = post(server, "/v1/completions", model=model, prompt="reverse:abcde>", max_tokens=6, temperature=0)
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]["text"]


def test_load_use_exchange_unload(loading, shelf):
    server, allowed, _ = loading
    answer = post(server, "/v1/load_lora_adapter", lora_name="new", lora_path="good")
    receipt = answer.json()["receipt"]
    assert receipt["tensors_applied"] == receipt["tensors_total"] > 0 and receipt["fingerprint"] == "match"
    assert said(server, "new") == offline(shelf, ["reverse:abcde>"], {"math": 1.0}, 6)[0]
    again = {"lora_name": "new", "lora_path": str(allowed / "inner")}
    conflict = post(server, "/v1/load_lora_adapter", **again)
    assert conflict.status_code == 409 and "load_inplace" in conflict.json()["error"]["message"]
    assert post(server, "/v1/load_lora_adapter", **again, load_inplace=True).status_code == 200
    listed = httpx.get(f"{server.url}/v1/lora_adapters").json()["data"]
    assert [(row["id"], row["version"], row["rank"], row["path"]) for row in listed] == [("new", 2, 4, "good")]
    assert post(server, "/v1/unload_lora_adapter", lora_name="new").json()["deleted"]
    assert post(server, "/v1/unload_lora_adapter", lora_name="new").status_code == 404
    assert post(server, "/v1/completions", model="new", prompt="a").status_code == 404


@pytest.mark.parametrize(
    "path", ["{outside}/stolen", "../outside0/stolen", "link", "halved", "/", "..", "/etc", "\0", "link/x"]
)
def test_nothing_comes_from_elsewhere(loading, path):
    server, _, outside = loading
    for given in (path.format(outside=outside), path.format(outside=outside) + "-absent"):
        if given in ("halved-absent", "link-absent", "..-absent"):
            continue  # these would lie inside
        answer = post(server, "/v1/load_lora_adapter", lora_name="thief", lora_path=given)
        assert answer.status_code == 403 and answer.json()["error"]["code"] == "path_not_allowed", given
    assert not server.serving.names()


def test_what_cannot_be_loaded_is_said(loading, server):
    target = loading[0]
    for path in ("absent", "long" * 200):
        absent = post(target, "/v1/load_lora_adapter", lora_name="a", lora_path=path)
        assert absent.status_code == 404 and absent.json()["error"]["code"] == "adapter_not_found"
    for name, path in (("a", "empty"), ("pocket", "good"), ("base", "good"), ("a/b", "good"), ("-", "good")):
        answer = post(target, "/v1/load_lora_adapter", lora_name=name, lora_path=path)
        assert answer.status_code == 400 and answer.json()["error"]["message"].endswith("."), (name, answer.text)
    assert not target.serving.names()


def test_a_server_without_folders_loads_nothing(shelf):
    with serving_of() as serving, running(serving) as server:
        answer = post(server, "/v1/load_lora_adapter", lora_name="a", lora_path=str(shelf["math"]))
        assert answer.status_code == 403 and "--adapter-dir" in answer.json()["error"]["message"]
