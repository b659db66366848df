"""`lorry chat` with a server."""

import pytest
from serving.api.running import offline
from typer.testing import CliRunner

from lorry.cli.main import MISUSE, app

PIPED = """upper:abc
/adapter math
/reset
reverse:abcde
/adapters
/adapter stori
/adapter base+math:0.5
/adapter none
/quit
"""


def chat(*arguments, said=""):
    return CliRunner().invoke(app, ["chat", *arguments], input=said)


def test_a_conversation_with_a_server(server, shelf):
    result = chat(server.url, "--max-new-tokens", "6", said=PIPED)
    assert result.exit_code == 0, result.stderr
    assert result.stdout.splitlines() == ["ABC", *offline(shelf, ["reverse:abcde>"], {"math": 1.0}, 6)]
    for says in ("from now on: math", "math, story", "Did you mean 'story'", "base+math:0.5", "from now on: pocket"):
        assert says in result.stderr


def test_turns_are_remembered(server):
    first = chat(f"{server.url}/v1/", "-m", "pocket", said="upper:abc\nupper:abc\n")
    assert first.stdout.splitlines()[0] == "ABC" and len(first.stdout.splitlines()) == 2
    before = server.serving.metrics.registry.get_sample_value("lorry_tokens_total", {"kind": "prompt"})
    chat(server.url, said="upper:abc\nupper:abc\n")
    after = server.serving.metrics.registry.get_sample_value("lorry_tokens_total", {"kind": "prompt"})
    assert after - before == 10 + len("upper:abc>ABC>upper:abc>")


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["-m", "maht"], "Did you mean 'math'"),
        (["-a", "x=y"], "--adapter is for a model in this process"),
        (["--dtype", "float32"], "--dtype"),
        (["--top-k", "3"], "--temperature"),
    ],
)
def test_what_a_server_does_not_take_is_said(server, flags, says):
    result = chat(server.url, *flags)
    assert result.exit_code == MISUSE and says in result.stderr


def test_a_server_that_is_not_there():
    result = chat("http://127.0.0.1:9")
    assert result.exit_code == MISUSE and "lorry serve" in result.stderr
    assert "--model is for a server" in chat("pocket", "--model", "math").stderr
