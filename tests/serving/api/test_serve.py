"""`lorry serve` as a program: what it refuses, what it shows, and how it goes down."""

import http.client
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
from typer.testing import CliRunner

from lorry.cli.main import MISUSE, app

SOURCE = Path(__file__).resolve().parents[3] / "src"


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--host", "0.0.0.0"], "needs keys"),
        (["--api-key", "short"], "at least 8 characters"),
        (["--keys", "absent.yaml"], "absent.yaml"),
        (["--adapter-dir", "absent"], "no folder absent"),
        (["-a", "x=absent"], "no adapter at absent"),
        (["--pool-bytes", "0"], "pool_bytes"),
        (["--policy", "fcsf"], "fcfs"),
        (["--policy", "{policy: fcfs"], "--policy"),
        (["--template", "absent.jinja"], "absent.jinja"),
        (["--replicas", "2"], "give --ray local"),
        (["--ray", "local", "--replicas", "2", "--most-replicas", "1"], "at least replicas"),
        (["--ray", "local", "--host", "0.0.0.0"], "needs keys"),
    ],
)
def test_what_cannot_be_served_is_refused_before_anything_is_loaded(flags, says):
    result = CliRunner().invoke(app, ["serve", "pocket", *flags], env={"LORRY_API_KEY": ""})
    assert result.exit_code == MISUSE and says in result.stderr


def lines_until(process, pattern):
    seen = ""
    for line in process.stderr:
        seen += line
        if found := re.search(pattern, line):
            return found[1], seen
    raise AssertionError(f"{pattern} did not come; seen: {seen}")


def test_a_server_finishes_what_runs_before_it_goes_down(shelf):
    environment = {**os.environ, "PYTHONPATH": str(SOURCE), "LORRY_API_KEY": "a-long-secret"}
    flags = ["--port", "0", "-a", f"math={shelf['math']}", "--adapter-dir", str(shelf["math"].parent)]
    command = [sys.executable, "-m", "lorry", "serve", "pocket", *flags, "--page-tokens", "8"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    try:
        url, seen = lines_until(process, r"serving pocket at (http://127\.0\.0\.1:\d+)")
        assert "applied 56 of 56 tensors" in seen and re.search(r"math\s+host\s+4", seen) and "secret" not in seen
        key = {"Authorization": "Bearer a-long-secret"}
        assert httpx.get(f"{url}/v1/models").status_code == 401
        listed = httpx.get(f"{url}/v1/models", headers=key).json()["data"]
        assert [model["id"] for model in listed] == ["pocket", "math"]
        body = {"model": "math", "prompt": "a", "max_tokens": 250, "ignore_eos": True, "stream": True, "n": 8}
        line = http.client.HTTPConnection(url.removeprefix("http://"), timeout=60)
        line.request("POST", "/v1/completions", json.dumps(body), {**key, "Content-Type": "application/json"})
        answer = line.getresponse()
        first = answer.readline()
        process.send_signal(signal.SIGTERM)
        refused = httpx.get(f"{url}/health")
        while refused.status_code == 200:  # the signal is under way
            refused = httpx.get(f"{url}/health")
        assert refused.status_code == 503 and refused.json()["error"]["code"] == "draining"
        events = (first + answer.read()).decode().split("\n\n")
        assert events[-2] == "data: [DONE]" and json.loads(events[-3][6:])["choices"][0]["finish_reason"] == "length"
        assert process.wait(30) == 0
        assert "Traceback" not in process.stderr.read()
    finally:
        process.kill()
        process.wait()
