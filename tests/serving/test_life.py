"""Requests and adapters come and go while others run."""

import pytest
from serving.tiny_engines import VOCABULARY, adapt, alone, engine, prompt, request, tiny

import lorry
from lorry.core.errors import AdapterError, OptionError


def saved(path, seed):
    """Write an adapter for the tiny Llama and return its folder."""
    adapt(tiny(), "a", seed=seed).save(path)
    return path


def stepped(machine, tokens):
    """Step once and add what comes of it to the tokens of each request."""
    for output in machine.step():
        tokens[output.id] = tokens.get(output.id, ()) + output.tokens


def finished(machine, tokens):
    """Step until nothing is left; return the tokens of each request."""
    while not machine.idle:
        stepped(machine, tokens)
    return tokens


def test_a_reload_leaves_running_requests_on_their_version(tmp_path):
    old, new = saved(tmp_path / "old", 1), saved(tmp_path / "new", 2)
    model = tiny()
    machine = engine(model)
    assert machine.load("a", old).tensors_applied == 28
    asked = request("0", prompt(5), "a")
    machine.submit(asked)
    stepped(machine, tokens := {})
    machine.load("a", new)
    machine.submit(request("1", prompt(5), "a"))
    versions = [(s.version, s.in_use) for s in machine.adapters()]
    assert versions == [(1, 1), (2, 1)]
    found = finished(machine, tokens)
    assert [(s.version, s.in_use) for s in machine.adapters()] == [(2, 0)]
    for id, path in (("0", old), ("1", new)):
        plain = tiny()
        lorry.load(plain, path, name="a")
        assert found[id] == alone(plain, asked)
    assert found["0"] != found["1"]


def test_unloading_lets_requests_end_and_takes_no_more(tmp_path):
    path = saved(tmp_path / "a", 1)
    model = tiny()
    machine = engine(model)
    machine.load("a", path)
    asked = request("0", prompt(5), "a")
    expected = request("0", prompt(5))
    machine.submit(asked)
    stepped(machine, tokens := {})
    machine.unload("a")
    with pytest.raises(AdapterError, match="No adapter 'a' is served"):
        machine.submit(request("1", prompt(5), "a"))
    found = finished(machine, tokens)
    assert machine.adapters() == [] and len(found["0"]) == 8
    assert not lorry.adapters(model)
    assert found["0"] != alone(model, expected)


def test_cancelled_requests_end_at_the_next_step_and_free_their_pages():
    model = tiny()
    machine = engine(model, prefix_cache=False)
    machine.submit(request("0", prompt(9)))
    machine.submit(request("1", prompt(6)))
    machine.step()
    assert machine.cancel("0") and not machine.cancel("nobody")
    outputs = {o.id: o for o in machine.step()}
    assert outputs["0"].finish == "cancelled" and outputs["0"].usage.completion == 1
    assert outputs["1"].finish is None
    assert finished(machine, {})
    assert machine.stats().pages_free == machine.stats().pages


@pytest.mark.parametrize(
    ("asked", "error"),
    [
        (request("0", ()), "empty prompt"),
        (request("0", (VOCABULARY,)), "knows tokens 0 to 96"),
        (request("0", (1,), "b"), "No adapter 'b' is served"),
        (request("0", (1,), {"a": float("nan")}), "finite number"),
        (request("0", prompt(100), most=29), "sees 128 at most"),
        (request("0", prompt(30), "a", most=20), "needs 13 pages of 4 tokens, but the pool has 12"),
        (request("0", (1,), most=0), "at least 1"),
    ],
)
def test_what_cannot_be_served_is_refused(asked, error):
    model = tiny()
    adapt(model, "a")
    machine = engine(model, pages=31)  # 19 of them for the adapter
    with pytest.raises((OptionError, AdapterError), match=error):
        machine.submit(asked)
    assert machine.idle and machine.adapters()[0].in_use == 0


def test_an_id_is_used_once_at_a_time():
    machine = engine(tiny())
    machine.submit(request("0", (1,)))
    with pytest.raises(OptionError, match="under way already"):
        machine.submit(request("0", (2,)))
    machine.generate([request("1", (3,))])
    assert machine.idle
    machine.submit(request("0", (2,)))


def test_a_stop_token_ends_an_answer():
    model = tiny()
    asked = request("0", prompt(5))
    answer = alone(model, asked)
    found = engine(model).generate([request("0", prompt(5), stop_tokens=(answer[3],))])[0]
    assert found.tokens == answer[: answer.index(answer[3]) + 1]
    assert (found.finish, found.stop) == ("stop", answer[3])
