"""Workloads have the statistics that they promise."""

import statistics

import pytest

from lorry.core.errors import OptionError
from lorry.serving.scheduling.workload import Workload, arrivals


def test_same_seed_same_requests():
    assert arrivals(Workload(seed=3)) == arrivals(Workload(seed=3)) != arrivals(Workload(seed=4))


@pytest.mark.parametrize("cv", [0.0, 0.5, 1.0, 3.0])
def test_arrivals_have_their_rate_and_variation(cv):
    found = arrivals(Workload(rate=20.0, seconds=500.0, cv=cv))
    gaps = [b.time - a.time for a, b in zip(found, found[1:], strict=False)]
    assert statistics.mean(gaps) == pytest.approx(0.05, rel=0.1)
    assert statistics.pstdev(gaps) / statistics.mean(gaps) == pytest.approx(cv, rel=0.1, abs=1e-9)


def test_adapters_follow_the_power_law_and_lengths_their_ranges():
    w = Workload(adapters=100, alpha=0.3, rate=100.0, seconds=100.0, shortest_input=5, longest_input=9)
    found = arrivals(w)
    # the first ten are drawn when u < 0.1 ** 0.3
    assert sum(a.adapter < 10 for a in found) / len(found) == pytest.approx(0.1**0.3, abs=0.03)
    assert {a.input for a in found} == set(range(5, 10))
    assert all(8 <= a.output <= 512 and 0 <= a.adapter < 100 for a in found)


def test_ranges_that_are_upside_down_are_refused():
    with pytest.raises(OptionError, match="'shortest_input' must be at most"):
        Workload(shortest_input=9, longest_input=5)
    with pytest.raises(OptionError, match="'ranks'"):
        Workload(ranks=())
