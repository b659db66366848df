"""Roles that write one text in turns over HTTP, against the trajectory of a fresh model."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import httpx
import pytest
import torch
from serving.api.running import running, serving_of

import lorry
from lorry import pocket
from lorry.serving.agents import POLICIES, Trajectory
from lorry.serving.agents.sessions import SessionBusy, SessionGone, SessionLimits, Sessions
from lorry.serving.http.keys import KeyRule, Keys
from lorry.serving.request import Sampling

NAMES = ("plan", "act", "reflect")
ROLES = {name: name for name in NAMES}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Adapters of three roles on queries and values, with one A at the values; and one with keys of its own."""
    folder = tmp_path_factory.mktemp("roles")
    shared: dict[str, torch.Tensor] = {}
    for seed, name in enumerate((*NAMES, "keys")):
        model, _ = pocket.load()
        targets = ["*.k_proj"] if name == "keys" else ["*.q_proj", "*.v_proj"]
        adapter = lorry.attach(model, {"method": "lora", "rank": 4, "alpha": 8}, targets=targets, name="a", seed=seed)
        draw = torch.Generator().manual_seed(seed)
        for path, tensor, _ in adapter.named_tensors():
            tensor.data.copy_(torch.randn(tensor.shape, generator=draw) * 0.1)
            if "v_proj" in path and tensor.shape[0] == 4:
                tensor.data.copy_(shared.setdefault(path, tensor.data.clone()))
        adapter.save(folder / name)
    return folder


def load(serving, folder):
    for name in (*NAMES, "keys"):
        serving.engine.load(name, folder / name)


@pytest.fixture(scope="module")
def server(folder):
    keys = Keys([KeyRule(name=n, key=f"key-of-{n}", key_sha256=None, adapters=a, max_tokens=m)
                 for n, a, m in (("all", None, None), ("few", ["plan"], 4))])  # fmt: skip
    with serving_of((folder,), keys) as serving:
        load(serving, folder)
        with running(serving) as found:
            yield found


def ask(server, method, path="", key="all", **body):
    headers = {"Authorization": f"Bearer key-of-{key}"}
    given = {"json": body} if method == "POST" else {}
    return httpx.request(method, f"{server.url}/v1/sessions{path}", headers=headers, timeout=60, **given)


def opened(server, **body):
    answer = ask(server, "POST", **{"roles": ROLES, **body})
    assert answer.status_code == 200, answer.text
    return f"/{answer.json()['id']}"


def offline(folder, policy, script):
    """What a trajectory of a fresh model comes to: text to append, or (role, tokens)."""
    model, tokenizer = pocket.load()
    for name in NAMES:
        lorry.load(model, folder / name, name=name, activate=False)
    trajectory = Trajectory(model, ROLES, policy)
    turns = []
    ends = (model.generation_config.eos_token_id,)
    for step in script:
        if isinstance(step, str):
            trajectory.append(tokenizer(step, add_special_tokens=False)["input_ids"])
        else:
            turns.append(list(trajectory.turn(*step, stop_tokens=ends).tokens))
    return trajectory, turns


SCRIPT = ("upper:banana>", ("plan", 5), ";star:", ("act", 4), ("reflect", 3), "x", ("plan", 4))


@pytest.mark.parametrize("policy", POLICIES)
def test_roles_take_turns_as_offline(server, folder, policy):
    path = opened(server, policy=policy)
    expected, turns = offline(folder, policy, SCRIPT)
    found = []
    for step in SCRIPT:
        if isinstance(step, str):
            assert ask(server, "POST", f"{path}/append", input=step).status_code == 200
        else:
            given = {"role": step[0], "max_tokens": step[1], "temperature": 0}
            found.append(ask(server, "POST", f"{path}/turn", **given).json())
    assert [turn["token_ids"] for turn in found] == turns
    assert [turn["role"] for turn in found] == [step[0] for step in SCRIPT if not isinstance(step, str)]
    shown = ask(server, "GET", path).json()
    assert shown["token_ids"] == expected.tokens and shown["cache"]["numbers"] == expected.numbers
    assert shown["forwarded"] == expected.counts.forwarded and shown["policy"] == policy
    used = found[-1]["usage"]
    # of the turn before, the last token has not been run, and then there is what was appended
    assert used["completion_tokens"] == len(turns[-1])
    cached = used["prompt_tokens_details"]["cached_tokens"]
    assert (cached == used["prompt_tokens"] - 2) == (policy in ("full-shared", "base-lr-shared"))
    assert ask(server, "DELETE", path).json()["deleted"]
    assert ask(server, "GET", path).status_code == 404


def test_a_turn_comes_as_it_is_made(server):
    whole, streamed = (opened(server) for _ in range(2))
    for path in (whole, streamed):
        ask(server, "POST", f"{path}/append", input="upper:apple>")
    given = {"role": "act", "max_tokens": 6, "temperature": 0.8, "seed": 3}
    expected = ask(server, "POST", f"{whole}/turn", **given).json()
    lines = ask(server, "POST", f"{streamed}/turn", stream=True, **given).text.strip().split("\n\n")
    assert lines[-1] == "data: [DONE]"
    pieces = [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]
    assert [t for piece in pieces for t in piece["token_ids"]] == expected["token_ids"]
    assert "".join(piece["text"] for piece in pieces) == expected["text"]
    assert pieces[-1]["usage"] == expected["usage"] and all("usage" not in piece for piece in pieces[:-1])


def test_a_stop_text_ends_a_turn_and_its_tokens_stay(server):
    path = opened(server, roles={"base": None})
    ask(server, "POST", f"{path}/append", input="upper:banana>")
    turn = ask(server, "POST", f"{path}/turn", role="base", max_tokens=9, temperature=0, stop="NA").json()
    assert (turn["text"], turn["finish_reason"], turn["stop_reason"]) == ("BA", "stop", "NA")
    shown = ask(server, "GET", path).json()
    assert shown["text"].endswith("BANA") and shown["token_ids"][-len(turn["token_ids"]) :] == turn["token_ids"]


def test_what_cannot_be(server):
    assert ask(server, "POST", roles={"a": "nobody"}).status_code == 404
    answer = ask(server, "POST", roles={"a": "keys"})
    assert answer.status_code == 400 and "changes keys" in answer.json()["error"]["message"]
    for body, says in (
        ({"roles": {}}, "roles"),
        ({"roles": {"a": "plan:0.5"}}, "composition"),
        ({"roles": ROLES, "policy": "base-share"}, "base-shared"),
        ({"roles": ROLES, "polcy": "x"}, "policy"),
    ):
        answer = ask(server, "POST", **body)
        assert answer.status_code == 400 and says in answer.json()["error"]["message"]
    path = opened(server)
    for where, body, says in (
        ("turn", {"role": "plan"}, "no text"),
        ("append", {"input": ""}, "at least one token"),
        ("append", {"input": [10**6]}, "no token"),
        ("append", {"input": "a" * 2000}, "sees"),
    ):
        answer = ask(server, "POST", f"{path}/{where}", **body)
        assert answer.status_code == 400 and says in answer.json()["error"]["message"], where
    ask(server, "POST", f"{path}/append", input="abc")
    for body, says in (({"role": "nobody"}, "no role"), ({"role": "plan", "n": 2}, "one answer"),
                       ({"role": "plan", "max_tokens": 10**6}, "context")):  # fmt: skip
        answer = ask(server, "POST", f"{path}/turn", **body)
        assert answer.status_code == 400 and says in answer.json()["error"]["message"]
    assert ask(server, "GET", "/session-of-nobody").status_code == 404


def test_sessions_belong_to_their_keys(server):
    path = opened(server)
    assert ask(server, "GET", path, key="few").status_code == 404
    assert ask(server, "POST", f"{path}/append", key="few", input="a").status_code == 404
    assert ask(server, "DELETE", path, key="few").status_code == 404
    assert path[1:] not in [each["id"] for each in ask(server, "GET", key="few").json()["data"]]
    assert path[1:] in [each["id"] for each in ask(server, "GET").json()["data"]]
    assert ask(server, "POST", key="few", roles={"a": "act"}).status_code == 403
    own = f"/{ask(server, 'POST', key='few', roles={'p': 'plan'}).json()['id']}"
    ask(server, "POST", f"{own}/append", key="few", input="abc")
    assert ask(server, "POST", f"{own}/turn", key="few", role="p", max_tokens=5).status_code == 400
    assert ask(server, "POST", f"{own}/turn", key="few", role="p", max_tokens=4).status_code == 200


def test_turns_and_requests_do_not_disturb_each_other(server, folder):
    """Generation by the engine runs between the tokens of a turn; both are what they are alone."""
    _, turns = offline(folder, "base-lr-shared", ("upper:banana>", ("plan", 24)))
    path = opened(server)
    ask(server, "POST", f"{path}/append", input="upper:banana>")
    found = []

    def complete():
        body = {"model": "act", "prompt": "star:apple>", "max_tokens": 12, "temperature": 0, "ignore_eos": True}
        headers = {"Authorization": "Bearer key-of-all"}
        answer = httpx.post(f"{server.url}/v1/completions", json=body, headers=headers, timeout=60)
        found.append(answer.json()["choices"][0]["text"])

    complete()
    threads = [threading.Thread(target=complete) for _ in range(3)]
    for thread in threads:
        thread.start()
    turn = ask(server, "POST", f"{path}/turn", role="plan", max_tokens=24, temperature=0).json()
    for thread in threads:
        thread.join()
    assert turn["token_ids"] == turns[0] and len(set(found)) == 1


def test_limits_close_those_that_were_used_longest_ago(folder):
    now = [0.0]
    with serving_of((folder,)) as serving:
        load(serving, folder)
        sessions = Sessions(serving.engine, SessionLimits(sessions=2, idle=100), clock=lambda: now[0])
        first, second = (sessions.open(ROLES, "base-lr-shared") for _ in range(2))
        sessions.append(second, (5, 6, 7))
        turn = sessions.begin(second, "plan", Sampling(max_tokens=3))
        with pytest.raises(SessionBusy):
            sessions.append(second, (1,))
        with pytest.raises(SessionBusy):
            sessions.begin(second, "act", Sampling())
        sessions.find(first.id)
        third = sessions.open({"a": None}, "non-shared")  # the first makes room, since the second is at work
        with pytest.raises(SessionGone):
            sessions.find(first.id)
        while turn.step().finish is None:
            pass
        sessions.end(second)
        assert len(second.trajectory.tokens) == 6
        # a reload leaves the session the version that it began with
        serving.engine.load("plan", folder / "act")
        users = {(each.name, each.version): each.in_use for each in serving.engine.adapters()}
        assert users[("plan", 1)] == 1 and users[("plan", 2)] == 0
        now[0] = 150.0
        second.used = 90.0
        assert [each.id for each in sessions.of("")] == [second.id]
        sessions.close(second)
        assert all(each.in_use == 0 for each in serving.engine.adapters())
        assert third.id not in [each.id for each in sessions.of("")]


def test_caches_are_bounded_together(folder):
    with serving_of((folder,)) as serving:
        load(serving, folder)
        sessions = Sessions(serving.engine, SessionLimits(bytes=1))
        opened = [sessions.open(ROLES, "base-lr-shared") for _ in range(2)]
        for each in opened:
            sessions.append(each, (5, 6, 7))
            turn = sessions.begin(each, "plan", Sampling(max_tokens=1))
            turn.step()
            sessions.end(each)
            assert each.bytes > 1
        sessions.find(opened[1].id)
        assert sessions.of("") == [opened[1]]
