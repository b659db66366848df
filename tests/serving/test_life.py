"""Requests and adapters come and go while others run."""

import threading

import pytest
import torch
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


def test_a_weight_that_is_too_large_ends_its_own_request_alone():
    model = tiny(dtype=torch.float32)
    adapt(model, "a", dtype=torch.float32)
    machine = engine(model)
    asked = [request("0", prompt(5), {"a": 1e38}), request("1", prompt(6), "a")]
    expected = alone(model, asked[1])
    found = machine.generate(asked)
    assert found[0].finish == "error" and "not numbers" in found[0].error
    assert found[1].tokens == expected
    again = machine.generate([request("0", prompt(5), {"a": 1e38})])[0]
    assert again.usage.cached == 0  # what may be broken is not kept


def test_an_adapter_pinned_meanwhile_makes_requests_wait_not_fail(tmp_path):
    path = saved(tmp_path / "a", 1)
    model = tiny()
    machine = engine(model, pages=40, prefix_cache=False)
    asked = [request(str(n), prompt(20), most=40) for n in range(2)]  # 15 pages each at their ends
    expected = [alone(model, each) for each in asked]
    for each in asked:
        machine.submit(each)
    stepped(machine, tokens := {})
    machine.load("a", path, pinned=True)  # 19 pages
    found = finished(machine, tokens)
    assert [found["0"], found["1"]] == expected and machine.stats().preemptions > 0
    machine._pool.check()
    assert machine.adapters()[0].place == "pool"


def test_what_fits_no_more_because_of_a_pinned_adapter_is_told_so(tmp_path):
    path = saved(tmp_path / "a", 1)
    machine = engine(tiny(), pages=30)
    machine.submit(request("0", prompt(20), most=40))
    machine.load("a", path, pinned=True)
    (output,) = machine.step()
    assert output.finish == "error" and "pinned" in output.error and machine.idle


def test_threads_submit_load_and_cancel_while_the_engine_steps(tmp_path):
    paths = [saved(tmp_path / str(seed), seed) for seed in (1, 2)]
    model = tiny()
    machine = engine(model, pages=80)
    machine.load("a", paths[0])
    expected = {}
    for number, path in enumerate(paths):
        plain = tiny()
        lorry.load(plain, path, name="a")
        expected[number] = [alone(plain, request("x", prompt(n), "a")) for n in range(1, 7)]
    problems, stop = [], threading.Event()

    def client(which):
        try:
            for n in range(6):
                machine.submit(request(f"{which}-{n}", prompt(n + 1), "a"))
                if n == 3:
                    machine.cancel(f"{which}-{n}")
        except Exception as error:
            problems.append(error)

    def loader():
        try:
            for turn in range(6):
                machine.load("a", paths[turn % 2])
                machine.adapters(), machine.stats()
        except Exception as error:
            problems.append(error)
        finally:
            stop.set()

    threads = [threading.Thread(target=client, args=(n,)) for n in range(3)] + [threading.Thread(target=loader)]
    for thread in threads:
        thread.start()
    tokens = {}
    while not (stop.is_set() and machine.idle and not any(t.is_alive() for t in threads)):
        stepped(machine, tokens)
    for thread in threads:
        thread.join()
    assert not problems
    for id, found in tokens.items():
        which, n = map(int, id.split("-"))
        assert n == 3 or found in (expected[0][n], expected[1][n])
    machine._pool.check()
    assert len(machine.adapters()) == 1 and len(lorry.adapters(model)) == 1
