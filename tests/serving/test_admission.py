"""The exact peak of pages, against a simulation step by step."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorry.serving.request import Request, Sampling
from lorry.serving.scheduling.admission import Admission, Held, fits, peak

QUICK = settings(max_examples=100, deadline=None, derandomize=True)
HELD = st.builds(
    Held, st.integers(1, 60), st.integers(0, 40), st.just(0), st.sampled_from([(), ("a",), ("b",), ("a", "b")])
)
PAGES = {"a": 12, "b": 7}


def simulated(held, page):
    """Return the most pages at any step, each request holding its own until after its last step."""
    most = 0
    for step in range(max((h.left for h in held), default=0) + 1):
        most = max(most, sum(-(-(h.tokens + step) // page) - h.shared for h in held if h.left >= step))
    return most


@QUICK
@given(held=st.lists(HELD, max_size=12), page=st.sampled_from([1, 2, 7, 16]))
def test_the_peak_is_that_of_a_simulation(held, page):
    assert peak(held, page) == simulated(held, page)


def test_the_peak_is_the_sheets_formula_for_pages_of_one_token():
    held = [Held(10, 5), Held(3, 30), Held(40, 1), Held(7, 5)]
    order = sorted(held, key=lambda h: -h.left)
    expected = max(h.left * (k + 1) + sum(o.tokens for o in order[: k + 1]) for k, h in enumerate(order))
    assert peak(held) == expected


def test_shared_pages_are_counted_by_somebody_else():
    assert peak([Held(64, 16, shared=3)], 16) == 5 - 3


@QUICK
@given(held=st.lists(HELD, min_size=1, max_size=10), page=st.sampled_from([1, 16]))
def test_a_tight_pool_is_enough_and_one_page_less_is_not(held, page):
    used = {name for h in held for name in h.adapters}
    tight = simulated(held, page) + sum(PAGES[name] for name in used)
    assert fits(held, tight, page=page, adapter_pages=PAGES)
    assert not fits(held, tight - 1, page=page, adapter_pages=PAGES)


@QUICK
@given(held=st.lists(HELD, max_size=12), page=st.sampled_from([1, 16]), pages=st.integers(1, 300))
def test_candidates_one_after_another_are_judged_as_all_together(held, page, pages):
    admission = Admission([], pages, page=page, adapter_pages=PAGES)
    admitted = []
    for candidate in held:
        expected = fits([*admitted, candidate], pages, page=page, adapter_pages=PAGES)
        assert admission.admit(candidate) == expected
        admitted += [candidate] * expected
        assert admission.needed <= pages
    if admitted:
        assert fits(admitted, admission.needed, page=page, adapter_pages=PAGES)
        assert not fits(admitted, admission.needed - 1, page=page, adapter_pages=PAGES)


def test_fixed_parts_refuse_what_one_pool_admits():
    candidate = Held(10, 10, adapters=("a",))
    assert Admission([], 32, adapter_pages=PAGES).admit(candidate)
    assert not Admission([], 16, adapter_pages=PAGES, adapters_apart=16).admit(candidate)
    assert not Admission([], 24, adapter_pages=PAGES, adapters_apart=8).admit(candidate)


def test_a_candidate_is_its_prompt_and_what_it_may_say():
    request = Request("r", (1, 2, 3), {"a": 1.0}, Sampling(max_tokens=5))
    assert Held.of(request, shared=1) == Held(4, 4, 1, ("a",))


def test_an_adapter_of_unknown_size_is_an_error_and_not_free():
    with pytest.raises(KeyError):
        fits([Held(1, 1, adapters=("c",))], 100, adapter_pages=PAGES)
