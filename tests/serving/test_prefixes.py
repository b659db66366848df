"""What was computed before is found again, by those alone whom it belongs to; and requests that must make way lose
nothing.
"""

import pytest
from serving.tiny_engines import adapt, alone, engine, prompt, request, tiny

from lorry.serving.paging.blocks import Blocks


@pytest.fixture(scope="module")
def model():
    found = tiny()
    adapt(found, "a", seed=1)
    adapt(found, "b", seed=2)
    return found


def test_a_prompt_is_found_under_its_own_composition_alone(model):
    asked = [request(str(n), prompt(14), c) for n, c in enumerate([None, "a", "b", {"a": 0.5}, {"a": 1.0, "b": 0.5}])]
    expected = [alone(model, each) for each in asked]
    machine = engine(model)
    assert [each.usage.cached for each in machine.generate(asked)] == [0] * 5
    again = machine.generate(asked)
    assert [each.usage.cached for each in again] == [12] * 5
    assert [each.tokens for each in again] == expected
    stats = machine.stats()
    assert (stats.prefix_hits, stats.prefix_misses, stats.tokens_cached) == (5, 5, 60)


def test_pages_found_by_tokens_alone_would_give_another_answer(model, monkeypatch):
    """The check itself: with composition and version left out of the key, answers go wrong."""
    asked = [request("0", prompt(14), "a"), request("1", prompt(14), "b")]
    expected = [alone(model, each) for each in asked]
    match, publish = Blocks.match, Blocks.publish
    monkeypatch.setattr(Blocks, "match", lambda self, root, tokens: match(self, "same", tokens))
    monkeypatch.setattr(Blocks, "publish", lambda self, root, *rest: publish(self, "same", *rest))
    machine = engine(model)
    found = [machine.generate([each])[0] for each in asked]
    assert found[0].tokens == expected[0] and found[1].tokens != expected[1] and found[1].usage.cached


def test_a_new_version_finds_nothing_of_the_old_one(model, tmp_path):
    import lorry

    lorry.adapters(model)["a"].save(tmp_path / "a")
    lorry.adapters(model)["b"].save(tmp_path / "b")
    base = tiny()
    machine = engine(base)
    machine.load("x", tmp_path / "a")
    asked = request("0", prompt(14), "x")
    machine.generate([asked])
    machine.load("x", tmp_path / "b")
    found = machine.generate([asked])[0]
    assert found.usage.cached == 0
    assert found.tokens == alone(model, request("0", prompt(14), "b"))


def test_an_answer_is_found_as_part_of_a_longer_prompt(model):
    machine = engine(model)
    first = machine.generate([request("0", prompt(10), "a", most=8)])[0]
    longer = request("1", (*prompt(10), *first.tokens, 3, 5), "a")
    expected = alone(model, longer)
    found = machine.generate([longer])[0]
    assert found.usage.cached == 16 and found.tokens == expected  # the last token's keys and values were not stored


def test_samples_of_one_prompt_compute_it_once(model):
    """Also where they come together: pages are found that the same pass fills."""
    asked = [request(str(n), prompt(22), "a", seed=n, temperature=1.0) for n in range(4)]
    machine = engine(model, pages=41)
    found = machine.generate(asked)
    assert [each.usage.cached for each in found] == [0, 20, 20, 20]
    single = engine(model, prefix_cache=False).generate(asked)
    assert [each.tokens for each in found] == [each.tokens for each in single]


def test_shared_pages_are_counted_once_in_admission(model):
    """Four samples of 22 tokens of prompt and 8 of answer: 5 pages together, and 3 for each."""
    asked = [request(str(n), prompt(22), seed=n, temperature=1.0) for n in range(4)]
    machine = engine(model, pages=19 + 5 + 4 * 3)
    for each in asked:
        machine.submit(each)
    machine.step()
    assert machine.stats().running == 4
    while not machine.idle:
        machine.step()
        machine._pool.check()


@pytest.mark.parametrize("preemption", ["recompute", "swap"])
@pytest.mark.parametrize("prefix_cache", [True, False])
def test_requests_that_make_way_lose_nothing(model, preemption, prefix_cache):
    asked = [request(str(n), prompt(6 + n), ["a", "b", None][n % 3], most=20, logprobs=0) for n in range(6)]
    expected = [alone(model, each) for each in asked]
    options = {"overcommit": True, "preemption": preemption, "prefix_cache": prefix_cache}
    machine = engine(model, pages=2 * 19 + 12, max_running=4, **options)
    tokens = {each.id: () for each in asked}
    for each in asked:
        machine.submit(each)
    while not machine.idle:
        for output in machine.step():
            tokens[output.id] += output.tokens
        machine._pool.check()
    assert [tokens[each.id] for each in asked] == expected
    assert machine.stats().preemptions > 0


@pytest.mark.parametrize("missing", [0, 1])
def test_admission_is_exact(monkeypatch, missing):
    """A batch that needs every page at its peak runs without a preemption, and with one page less it waits."""
    asked = [request("0", prompt(5), most=16), request("1", prompt(9), most=3), request("2", prompt(2), most=9)]
    ends = [(5 + 16 - 1, 16), (9 + 3 - 1, 3), (2 + 9 - 1, 9)]  # tokens stored at the end, steps
    lengths = [[min(last - steps + 1 + t, last) for t in range(steps)] for last, steps in ends]
    most = max(sum(-(-own[t] // 4) for own in lengths if t < len(own)) for t in range(16))
    machine = engine(tiny(), pages=most - missing, prefix_cache=False)
    left, take = [], machine._pool.take
    monkeypatch.setattr(machine._pool, "take", lambda n: (take(n), left.append(machine._pool.free))[0])
    for each in asked:
        machine.submit(each)
    machine.step()
    assert machine.stats().running == 3 - missing
    while not machine.idle:
        machine.step()
        machine._pool.check()
    assert machine.stats().preemptions == 0 and (missing or min(left) == 0)
