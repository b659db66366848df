"""The order in which waiting requests are tried, policy by policy."""

import pytest

from lorry.core.errors import OptionError
from lorry.serving.request import Request
from lorry.serving.scheduling.policy import POLICIES, View, policy_from


def request(id, adapter="", key="", arrival=0.0, deadline=None, tokens=10):
    return Request(id, (1,) * tokens, {adapter: 1.0} if adapter else {}, key=key, arrival=arrival, deadline=deadline)


def filled(policy, requests):
    policy = policy_from(policy)
    for each in requests:
        policy.arrive(each, each.arrival)
    return policy


def admitted(policy, view=None, room=99, refuse=()):
    """Return the ids that an engine admits that has room for so many and refuses some."""
    found = []
    for each in policy.next(view or View(0.0)):
        if len(found) == room:
            break
        if each.id not in refuse:
            policy.leave(each.id)
            policy.charge(each, len(each.prompt), 0)
            found.append(each.id)
    return "".join(found)


@pytest.mark.parametrize("name", sorted(POLICIES))
def test_every_policy_serves_everyone_once_and_forgets_who_leaves(name):
    policy = filled(name, [request(c, c, key=c) for c in "abcdef"])
    policy.leave("d")
    policy.leave("unknown")
    found = ""
    while len(policy):  # the batch runs empty between rounds
        found += (more := admitted(policy, room=2))
        assert more
    assert sorted(found) == list("abcef")
    assert admitted(policy) == ""


@pytest.mark.parametrize("name", sorted(POLICIES))
def test_a_preempted_request_comes_back_in_front(name):
    policy = filled(name, [request(c, "x", key="k") for c in "abc"])
    assert admitted(policy, room=1) in ("a", "c")  # early abort begins with the newest
    policy.again(request("p", "x", key="k"), 1.0)
    running = View(1.0, [request("r", "x")])
    left = admitted(policy, running)
    assert left.startswith("p") and len(left) == 3


def test_first_come_stops_at_the_first_refusal():
    policy = filled("fcfs", [request(c) for c in "abcd"])
    assert admitted(policy, refuse="c") == "ab"
    assert list(policy.waiting) == ["c", "d"]


def test_cluster_takes_what_runs_first_once_there_are_enough_adapters():
    def waiting():
        return filled({"policy": "cluster", "adapters": 2}, [request(*pair) for pair in ("ax", "bz", "cy", "dx", "ez")])

    few, enough = View(0.0, [request("r", "x")]), View(0.0, [request("r", "x"), request("s", "y")])
    assert admitted(waiting(), few) == "abcde"
    assert admitted(waiting(), enough) == "adcbe"
    # past a refusal among those that run, up to the first one among the others
    assert admitted(waiting(), enough, refuse="a") == "dcbe"
    assert admitted(waiting(), enough, refuse="ab") == "dc"


def test_early_abort_drops_who_is_too_late():
    policy = filled({"policy": "abort", "deadline": 6.0, "margin": 0.5}, [request("a"), request("b", arrival=2.0)])
    policy.arrive(request("c", deadline=3.0), 0.0)
    assert [r.id for r in policy.drop(2.4)] == []
    assert [r.id for r in policy.drop(2.5)] == ["c"]
    assert [r.id for r in policy.drop(5.5)] == ["a"]
    assert list(policy.waiting) == ["b"]


def test_early_abort_serves_the_newest_while_the_queue_grows_and_the_oldest_otherwise():
    policy = filled("abort", [request(c) for c in "abcdefgh"])
    # growth int(0.7 * 8) = 5 >= batch 1
    assert admitted(policy, room=2) == "hg"
    # batch is max(int(0.7 * 2 + 0.3), 1) = 1, growth int(0.7 * (6 - 8) + 0.3 * 5) = 0
    assert admitted(policy, room=2) == "ab"


def test_fair_serves_who_has_had_least_and_counts_answers_twice():
    policy = filled("fair", [request("a", key="x"), request("b", key="x"), request("c", key="y", tokens=30)])
    policy.arrive(request("d", key="y"), 0.0)
    assert admitted(policy, room=2) == "ac"
    assert policy.counters == {"x": 10.0, "y": 30.0}
    policy.charge(request("a", key="x"), 0, 15)
    assert policy.counters["x"] == 40.0
    assert admitted(policy) == "db"


def test_fair_lifts_who_comes_back_to_the_least_of_those_who_wait():
    policy = filled("fair", [request("a", key="x"), request("b", key="x")])
    policy.charge(request("a", key="x"), 100, 0)
    policy.arrive(request("c", key="late"), 0.0)
    assert policy.counters == {"x": 100.0, "late": 100.0}
    policy.leave("c")
    policy.charge(request("c", key="late"), 500, 0)
    policy.arrive(request("d", key="late"), 0.0)
    assert policy.counters["late"] == 600.0


def test_fair_divides_by_weights_and_may_go_by_adapter():
    policy = filled({"policy": "fair", "by": "adapter", "weights": {"x": 2.0}}, [request("a", "x"), request("b", "y")])
    policy.charge(request("a", "x"), 10, 5)
    assert policy.counters == {"x": 10.0, "y": 0.0}
    with pytest.raises(OptionError, match="weight of 'x' must be above 0"):
        policy_from({"policy": "fair", "weights": {"x": 0.0}})


def test_a_flood_of_one_key_does_not_hold_up_another():
    policy = filled("fair", [request(f"{i} ", key="flood") for i in range(50)])
    policy.arrive(request("quiet", key="quiet"), 0.0)
    assert "quiet" in admitted(policy, room=2)


def test_single_keeps_to_one_composition_until_too_many_were_passed_over():
    requests = [request(*pair) for pair in ("ax", "by", "cx", "dy", "ex", "fz", "gx")]
    policy = filled({"policy": "single", "passed": 2}, requests)
    assert admitted(policy) == "ac"
    running = View(0.0, requests[:1])
    assert admitted(policy, running) == ""  # the batch is to run empty
    assert admitted(policy) == "bd"


def test_unknown_policies_and_options_are_refused_with_near_misses():
    with pytest.raises(OptionError, match="Did you mean 'cluster'"):
        policy_from("clustr")
    with pytest.raises(OptionError, match="no option 'adapter'"):
        policy_from({"policy": "cluster", "adapter": 3})
    with pytest.raises(OptionError, match="at least 1"):
        policy_from({"policy": "cluster", "adapters": 0})
