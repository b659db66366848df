"""The simulator of deployments: exact where it can be worked out by hand, and the paper's comparison of pools."""

import pytest

from lorry.core.errors import OptionError
from lorry.serving.scheduling.deployment import Deployment
from lorry.serving.scheduling.policy import POLICIES
from lorry.serving.scheduling.routing import ROUTERS
from lorry.serving.scheduling.simulate import simulate
from lorry.serving.scheduling.workload import Arrival, Workload

#: Steps of a second, whatever is in them.
PLAIN = dict(page=1, tokens_per_rank=4, step_seconds=1.0, decode_seconds=0.0, prompt_seconds=0.0, load_seconds=0.0)
W = Workload(adapters=4, ranks=(2,), deadline=6.0)


def test_one_request_by_hand():
    d = Deployment(**{**PLAIN, "pages": 40, "prompt_seconds": 0.5, "load_seconds": 0.25, "decode_seconds": 0.125})
    r = simulate(d, W, [Arrival(3.0, 0, 4, 6)])
    # a step, 4 tokens of prompt, 8 pages of adapter; then 5 steps of one request
    assert r.first_token == [1.0 + 4 * 0.5 + 8 * 0.25]
    assert r.seconds == 3.0 + 5.0 + 5 * 1.125
    assert (r.served, r.hits, r.in_time, r.output_tokens) == (1, 0, 1, 6)
    assert r.satisfaction == pytest.approx(1 - (5 / 6) ** 2)
    # as the only round begins: the prompt and a first token, and the adapter
    assert (r.row()["token pages"], r.row()["adapter pages"], r.row()["adapters held"]) == (5, 8, 1)


def test_who_does_not_fit_waits_for_an_end_and_an_adapter_that_stays_is_a_hit():
    # each request comes to hold 4 + 6 tokens beside 8 pages of the one adapter
    trace = [Arrival(0.0, 0, 4, 6), Arrival(0.0, 0, 4, 6)]
    both = simulate(Deployment(**PLAIN, pages=28), W, trace)
    assert both.admitted == [0.0, 6.0]  # the second came when the first round had begun, which ends with the first
    assert (both.hits, both.first_token) == (1, [1.0, 7.0])
    assert simulate(Deployment(**PLAIN, pages=18), W, trace).refused == 0
    assert simulate(Deployment(**PLAIN, pages=17), W, trace).refused == 2


def test_two_join_one_round_where_both_fit_to_their_ends():
    # a first round of one step, then both of the others, which come to hold 10 pages each, or one after the other
    trace = [Arrival(0.0, 0, 1, 1), Arrival(0.5, 0, 4, 6), Arrival(0.5, 0, 4, 6)]
    assert simulate(Deployment(**PLAIN, pages=28), W, trace).admitted == [0.0, 1.0, 1.0]
    assert simulate(Deployment(**PLAIN, pages=27), W, trace).admitted == [0.0, 1.0, 7.0]


def test_prompts_beyond_the_limit_of_a_step_come_in_the_next_round():
    trace = [Arrival(0.0, 0, 1, 1), *[Arrival(0.5, 0, 40, 100)] * 3]
    d = Deployment(**PLAIN, pages=4000, prompt_tokens=80, admit_every=10)
    assert simulate(d, W, trace).admitted == [0.0, 1.0, 1.0, 12.0]


def test_batches_grow_between_rounds():
    trace = [Arrival(0.0, 0, 4, 50), Arrival(0.5, 0, 4, 50), Arrival(0.6, 0, 4, 50)]
    r = simulate(Deployment(**PLAIN, pages=400, admit_every=10), W, trace)
    assert r.admitted == [0.0, 11.0, 11.0]


def test_an_idle_adapter_leaves_when_its_pages_are_needed():
    trace = [Arrival(0.0, 0, 4, 6), Arrival(20.0, 1, 4, 6), Arrival(40.0, 0, 4, 6)]
    assert simulate(Deployment(**PLAIN, pages=26), W, trace).hits == 1
    assert simulate(Deployment(**PLAIN, pages=20), W, trace).hits == 0


@pytest.mark.parametrize("policy", sorted(POLICIES))
@pytest.mark.parametrize("routing", sorted(ROUTERS))
def test_every_request_is_accounted_for(policy, routing):
    w = Workload(adapters=50, alpha=0.5, rate=12.0, seconds=20.0, cv=3.0, ranks=(8, 64), longest_output=128)
    r = simulate(Deployment(replicas=3, pages=400, policy=policy, routing=routing, slack=2), w)
    assert r.served + r.dropped + r.refused == r.requests > 100
    assert len(r.admitted) == r.served
    assert r.in_time <= r.served and 0 < r.row()["busy"] <= 1
    assert (r.dropped > 0) <= (policy == "abort")


def test_the_same_seed_gives_the_same_report():
    w = Workload(seconds=10.0)
    assert simulate(Deployment(replicas=2, routing="random"), w) == simulate(
        Deployment(replicas=2, routing="random"), w
    )


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("cv", [1.0, 6.0])
def test_one_pool_admits_no_fewer_than_the_best_fixed_parts_and_more_on_bursts(seed, cv):
    w = Workload(
        adapters=40,
        rate=3.0,
        seconds=40.0,
        cv=cv,
        ranks=(8, 16, 32, 64),
        longest_input=128,
        longest_output=128,
        seed=seed,
    )
    options = {**PLAIN, "step_seconds": 0.03, "pages": 1500}
    one = simulate(Deployment(**options), w)
    parts = [simulate(Deployment(**options, adapter_share=share), w) for share in (0.2, 0.3, 0.4, 0.5, 0.6, 0.7)]
    times = [2.0 * i for i in range(1, 30)]
    best = max(parts, key=lambda r: sum(r.admitted_by(t) for t in times))
    assert all(one.admitted_by(w.seconds) >= r.admitted_by(w.seconds) for r in parts)
    gain = sum(one.admitted_by(t) - best.admitted_by(t) for t in times)
    assert gain > 0 if cv > 1 else gain >= 0


def test_affinity_finds_adapters_in_the_pool_and_does_not_overload_as_hashing_does():
    w = Workload(adapters=400, alpha=0.25, rate=40.0, seconds=30.0, longest_output=128)
    found = {
        routing: simulate(Deployment(replicas=10, pages=400, routing=routing), w)
        for routing in ("random", "hash", "affinity")
    }
    hits = {routing: r.row()["adapter hits"] for routing, r in found.items()}
    late = {routing: r.first_token_quantile(0.99) for routing, r in found.items()}
    assert hits["affinity"] > hits["random"] + 0.05
    assert late["affinity"] < late["hash"]


def test_fair_keeps_a_quiet_key_from_waiting_behind_a_flood():
    flood = [Arrival(0.01 * i, 0, 100, 100) for i in range(200)]
    trace = sorted([*flood, *(Arrival(1.0 + 4 * i, 1, 10, 10) for i in range(5))])
    options = dict(pages=200, adapter_share=None)
    slow, quick = (simulate(Deployment(**options, policy=p), W, trace) for p in ("fcfs", "fair"))
    assert quick.in_time > slow.in_time


def test_early_abort_meets_more_deadlines_under_overload():
    w = Workload(adapters=5, rate=20.0, seconds=60.0, longest_output=200)
    first, abort = (simulate(Deployment(pages=400, policy=p), w) for p in ("fcfs", "abort"))
    assert abort.in_time > 2 * first.in_time


def test_options_out_of_range_are_refused():
    with pytest.raises(OptionError, match="'adapter_share' must be at most 1"):
        Deployment(adapter_share=1.5)
    with pytest.raises(OptionError, match="no routing policy 'afinity'.*'affinity'"):
        simulate(Deployment(routing="afinity"), W)
