"""Samplers and chat templates of `lorry generate`, and `lorry chat` with piped input and in a pseudo terminal."""

from __future__ import annotations

import os
import select
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lorry.cli.chat import Conversation
from lorry.cli.main import MISUSE
from lorry.cli.sampling import Sampling, chat_tokens, conversation, template_of
from lorry.core.errors import OptionError

SOURCE = Path(__file__).resolve().parents[2] / "src"


@pytest.fixture(scope="module")
def swap(run_json, tmp_path_factory):
    """An adapter of the pocket model that exchanges neighbours, trained on conversations."""
    folder = tmp_path_factory.mktemp("chat")
    run_json("init", "chat", folder / "run.yaml")
    report = run_json("train", folder / "run.yaml", "--set", "steps=60", "--set", "batch_size=16")
    return Path(report["jobs"][0]["adapter"])


# -- samplers


def generated(run_json, *flags):
    prompts = ("-p", "reverse:abcde>", "-p", "upper:abcde>")
    return [row["text"] for row in run_json("generate", "pocket", *prompts, "--max-new-tokens", 8, *flags)["rows"]]


def test_samplers_reach_the_distribution(run_json):
    greedy = generated(run_json)
    hot = ("--temperature", 5)
    assert generated(run_json, *hot) != greedy
    for narrow in (("--top-k", 1), ("--top-p", 1e-6), ("--min-p", 1)):
        assert generated(run_json, *hot, *narrow) == greedy
    assert generated(run_json, *hot, "--seed", 1) == generated(run_json, *hot, "--seed", 1)
    assert generated(run_json, *hot, "--seed", 1) != generated(run_json, *hot, "--seed", 2)
    assert generated(run_json, "--repetition-penalty", 20) != greedy


def test_generation_stops_before_a_stop_text(run_json):
    assert generated(run_json, "--stop", "cb", "--stop", "D") == ["ed", "ABC"]
    assert Sampling(stop=("b", "a")).cut("xxabyy") == "xx"


def test_what_would_do_nothing_is_refused(lorry):
    result = lorry("generate", "pocket", "-p", "x", "--top-k", 5)
    assert result.exit_code == MISUSE and "--temperature" in result.stderr
    assert lorry("generate", "pocket", "-p", "x", "--system", "y").exit_code == MISUSE
    with pytest.raises(OptionError, match="--stop"):
        Sampling(stop=("",))


# -- chat templates


def test_generate_takes_what_a_user_says(run_json, swap):
    flags = ("-a", f"swap={swap}", "--max-new-tokens", 8)
    chat = run_json("generate", "pocket", *flags, "--chat", "-p", "swap:abcdef")
    plain = run_json("generate", "pocket", *flags, "-p", "swap:abcdef>")
    assert chat["rows"][0]["text"] == plain["rows"][0]["text"] == "badcfe"


def test_a_template_of_a_file_takes_the_place_of_the_tokenizers(run_json, swap, tmp_path):
    file = tmp_path / "loud.jinja"
    file.write_text("{% for m in messages %}{{ m['role'][0] }}={{ m['content'] }};{% endfor %}>", encoding="utf-8")
    from lorry.pocket import load

    tokenizer = load()[1]
    template = template_of(tokenizer, file)
    tokens = chat_tokens(tokenizer, conversation("hi", "be kind"), template)
    assert tokenizer.decode(tokens) == "s=be kind;u=hi;>"
    with pytest.raises(OptionError, match="refuses"):
        chat_tokens(tokenizer, conversation("hi", None), "{{ raise_exception('no') }}")


def test_a_base_without_a_chat_template_says_what_to_do(lorry, base):
    for command in (("generate", base, "--chat", "-p", "red"), ("chat", base)):
        result = lorry(*command)
        assert result.exit_code == MISUSE and "--template FILE" in result.stderr


# -- chat

PIPED = "swap:abcdef\n/reset\n/adapter none\nswap:abcdef\n\n/adapter nope\n/nonsense\n/quit\nswap:never\n"


def test_a_conversation_from_a_pipe(swap):
    from typer.testing import CliRunner

    from lorry.cli.main import app

    arguments = ["chat", "pocket", "-a", f"swap={swap}", "--max-new-tokens", "8"]
    result = CliRunner().invoke(app, arguments, input=PIPED)
    assert result.exit_code == 0, result.stderr
    answers = result.stdout.splitlines()
    assert answers[0] == "badcfe" and answers[1] != "badcfe" and len(answers) == 2
    assert "from now on: (base)" in result.stderr
    assert "no adapter 'nope'" in result.stderr and "no command /nonsense" in result.stderr


def test_turns_are_remembered_until_the_reset(swap):
    from lorry.cli.bases import load_base, load_tokenizer

    talk = Conversation(load_base("pocket"), load_tokenizer("pocket"), template_of(load_tokenizer("pocket"), None),
                        Sampling(max_new_tokens=6), {}, {}, "quiet")  # fmt: skip
    assert talk.hear("reverse:abc") and talk.hear("upper:abc")
    roles = [m["role"] for m in talk.messages]
    assert roles == ["user", "assistant"] * 2 and talk.messages[2]["content"] == "upper:abc"
    assert talk.hear("/system") and talk.system is None
    assert talk.hear("/reset") and not talk.messages
    assert not talk.hear("/quit")


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="no pseudo terminals on this system")
def test_a_conversation_in_a_terminal(swap):
    leader, follower = os.openpty()
    environment = {**os.environ, "PYTHONPATH": str(SOURCE), "TERM": "dumb"}
    command = [sys.executable, "-m", "lorry", "chat", "pocket", "-a", f"swap={swap}"]
    process = subprocess.Popen(command, stdin=follower, stdout=follower, stderr=follower, env=environment)
    os.close(follower)
    seen = b""
    try:
        for wanted, typed in ((b"\n> ", b"swap:abcdef\n"), (b"badcfe", b"/quit\n")):
            while wanted not in seen:
                assert select.select([leader], [], [], 90)[0], f"{wanted!r} did not come; seen: {seen!r}"
                seen += os.read(leader, 1000)
            seen = b""
            os.write(leader, typed)
        assert process.wait(timeout=60) == 0
    finally:
        process.kill()
        process.wait()
        os.close(leader)


def test_what_applies_in_a_conversation_is_what_was_asked_for(swap):
    import lorry as package
    from lorry.cli.bases import load_base, load_tokenizer

    model, tokenizer = load_base("pocket"), load_tokenizer("pocket")
    package.load(model, swap, name="swap")
    talk = Conversation(model, tokenizer, template_of(tokenizer, None), Sampling(), {"swap": 1.0}, {"swap": 1.0})
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        whole = model(ids).logits
        talk.hear("/adapter swap:0")
        nothing = model(ids).logits
        talk.hear("/adapter none")
        bare = model(ids).logits
    torch.testing.assert_close(nothing, bare)
    assert not torch.allclose(whole, bare)
