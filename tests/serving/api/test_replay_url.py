"""A workload replayed over HTTP against a real server."""

import asyncio
import json

import pytest
from serving.api.running import running, serving_of
from typer.testing import CliRunner

from lorry.cli.main import app
from lorry.serving.http.keys import KeyRule, Keys
from lorry.serving.replay_url import Remote, Unanswered
from lorry.serving.scheduling.workload import Workload

WORK = {"rate": 40, "seconds": 0.5, "longest_input": 6, "shortest_input": 2, "longest_output": 4, "shortest_output": 2}


def test_every_request_is_answered_to_its_length(server):
    remote = Remote(f"{server.url}/v1/")
    assert (remote.base, set(remote.adapters)) == ("pocket", {"math", "story"})
    found = asyncio.run(remote.replay(Workload(**WORK, adapters=2), remote.adapters))
    assert len(found.timings) > 5
    for each in found.timings:
        assert each.tokens == each.arrival.output and not each.why
        assert each.arrival.time <= each.first <= each.end
    assert found.figures()["served"] == len(found.timings)
    absent = asyncio.run(remote.replay(Workload(**WORK, adapters=1), ["none"]))
    assert absent.figures()["served"] == 0 and all("none" in each.why for each in absent.timings)


def test_the_command_asks_with_a_key():
    with (
        serving_of(keys=Keys([KeyRule(name="me", key="a-long-secret", key_sha256=None)])) as serving,
        running(serving) as server,
    ):
        with pytest.raises(Unanswered, match="A key is needed"):
            Remote(server.url)
        given = [f for name, value in WORK.items() for f in ("--workload", f"{name}={value}")]
        command = ["serve", server.url, "--bench", "--json", "--api-key", "a-long-secret", *given]
        answer = CliRunner().invoke(app, command)
        assert answer.exit_code == 0, answer.output
        figures = json.loads(answer.stdout)["figures"]
        assert figures["served"] == figures["requests"] > 5
