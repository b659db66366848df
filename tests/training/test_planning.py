"""Plans of micro-batches: every sample once, within the capacity, in an order that a pipeline can run; any lengths."""

import random
from itertools import pairwise, product

import pytest
from hypothesis import given
from hypothesis import strategies as st
from laws.drawing import effort

from lorry.core.errors import LorryError, OptionError
from lorry.training.planning.order import Rules, grouped_jobs, joined, planned
from lorry.training.planning.packing import Limits, first_fit, packed
from lorry.training.planning.samples import Sample, load, mixes, verify, with_no_ops

CAPACITY = 64


def samples_of(lengths):
    """Samples of ``{job: [[tokens of each sample] of each step]}``."""
    return [
        Sample(job, step, place, tokens)
        for job, steps in lengths.items()
        for step, batch in enumerate(steps)
        for place, tokens in enumerate(batch)
    ]


STEPS = st.lists(st.lists(st.integers(1, CAPACITY), min_size=1, max_size=5), min_size=1, max_size=3)
WORK = st.dictionaries(st.sampled_from("abcd"), STEPS, min_size=1, max_size=4).map(samples_of)


@st.composite
def rules(draw):
    return Rules(
        CAPACITY,
        multiple=draw(st.sampled_from((1, 8, 32))),
        stages=draw(st.integers(1, 4)),
        slack=draw(st.sampled_from((0, 16, CAPACITY))),
        look_ahead=draw(st.integers(0, 8)),
        limits=draw(st.sampled_from((None, Limits(5.0, 20)))),
    )


def through_a_pipeline(batches, stages):
    """Say whether no global batch enters before the one before it has left, place after place."""
    left = {}
    for place, batch in enumerate(batches):
        for sample in batch:
            left[sample.job, sample.step] = place
    return all(
        place - left[sample.job, sample.step - 1] >= stages
        for place, batch in enumerate(batches)
        for sample in batch
        if (sample.job, sample.step - 1) in left
    )


@given(WORK, rules())
@effort(60)
def test_every_sample_once_within_capacity_and_in_order(samples, rules):
    batches = planned(samples, rules)
    assert sorted(s for batch in batches for s in batch) == sorted(samples)
    assert all(load(batch, rules.multiple) <= CAPACITY and not mixes(batch) for batch in batches)
    assert through_a_pipeline(batches, rules.stages)
    assert rules.stages > 1 or all(batches)


@given(WORK, rules(), st.randoms(use_true_random=False))
@effort(25)
def test_a_plan_does_not_depend_on_the_order_in_which_samples_are_named(samples, rules, random):
    shuffled = random.sample(samples, len(samples))
    assert planned(shuffled, rules) == planned(samples, rules)


@given(STEPS.map(lambda steps: samples_of({"a": steps[:1], "b": steps[-1:]})), st.sampled_from((1, 8, 32)))
@effort(40)
def test_packing_is_never_worse_than_first_fit_and_that_never_worse_than_padding(samples, multiple):
    greedy, best = (first_fit(samples, CAPACITY, multiple), packed(samples, CAPACITY, multiple, Limits()))
    assert (len(best), load(best[-1], multiple)) <= (len(greedy), load(greedy[-1], multiple))
    longest = max(load([s], multiple) for s in samples)
    assert len(greedy) <= -(-len(samples) // (CAPACITY // longest))
    assert all(load(a, multiple) >= load(b, multiple) for a, b in pairwise(best))


@given(st.lists(st.integers(1, CAPACITY), min_size=2, max_size=6))
@effort(40)
def test_programs_find_what_trying_every_packing_finds(lengths):
    samples = samples_of({"a": [lengths]})
    found = packed(samples, CAPACITY, 1, Limits(60.0, 100_000))
    best = min(_tried(samples))
    assert (len(found), load(found[-1])) == best


def _tried(samples):
    """Yield number of bins and load of the emptiest of every packing."""
    for choice in product(range(len(samples)), repeat=len(samples)):
        if all(b <= max(choice[:i], default=-1) + 1 for i, b in enumerate(choice)):
            bins = [[s for s, b in zip(samples, choice, strict=True) if b == n] for n in range(max(choice) + 1)]
            if all(load(b) <= CAPACITY for b in bins):
                yield len(bins), min(map(load, bins))


def test_the_program_saves_a_micro_batch_where_first_fit_decreasing_wastes_one():
    lengths = [[31, 17, 16, 31, 17, 16, 22, 21, 21]]
    samples = samples_of({"a": lengths})
    assert sum(lengths[0]) == 3 * CAPACITY
    assert (len(first_fit(samples, CAPACITY)), len(packed(samples, CAPACITY, 1, Limits(60.0, 1000)))) == (4, 3)


def test_no_ops_are_as_few_as_the_pipeline_needs():
    a0, a1, b0 = Sample("a", 0, 0, 5), Sample("a", 1, 0, 5), Sample("b", 0, 0, 5)
    assert with_no_ops([(a0,), (a1,)], 4) == [(a0,), (), (), (), (a1,)]
    assert with_no_ops([(a0,), (b0,), (a1,)], 3) == [(a0,), (b0,), (), (a1,)]
    assert with_no_ops([(a0,), (a1,)], 1) == [(a0,), (a1,)]
    assert with_no_ops([(a1,), (a0,)], 1) is None
    assert with_no_ops([(a0, a1)], 1) is None
    early = Sample("a", 0, 1, 5)
    assert with_no_ops([(a0,), (a1,), (early,)], 1) is None


def test_joining_takes_in_the_smallest_that_fits_and_keeps_global_batches_apart():
    a0, a1 = Sample("a", 0, 0, 10), Sample("a", 1, 0, 10)
    b0, c0 = Sample("b", 0, 0, 40), Sample("c", 0, 0, 20)
    rules = Rules(CAPACITY, slack=16)
    assert joined([(a0,), (b0,), (c0,), (a1,)], rules) == [(a0, c0), (a1, b0)]
    assert joined([(a0,), (a1,)], rules) == [(a0,), (a1,)]
    assert joined([(a0,), (b0,)], Rules(CAPACITY, slack=16, look_ahead=0)) == [(a0,), (b0,)]


def test_jobs_of_long_samples_are_paired_with_jobs_of_short_ones_while_the_others_fill_the_pipeline():
    draw = random.Random(0)
    lengths = {"long": 50, "longish": 40, "short": 10, "shortest": 5}
    samples = samples_of({job: [[n + draw.randint(0, 3) for _ in range(6)]] * 2 for job, n in lengths.items()})
    paired = grouped_jobs(samples, Rules(CAPACITY, stages=2))
    assert paired == [("long", "shortest"), ("longish", "short")]
    alone = grouped_jobs(samples, Rules(CAPACITY, stages=20))
    assert sorted(alone) == [("long",), ("longish",), ("short",), ("shortest",)]


def test_a_sample_above_the_capacity_is_refused_with_what_to_do():
    samples = samples_of({"a": [[3]], "wide": [[CAPACITY + 1]]})
    for plan in (first_fit, lambda s, c: planned(s, Rules(c))):
        with pytest.raises(OptionError, match="'wide' has 65 tokens.*capacity to at least 65, or the job's max_length"):
            plan(samples, CAPACITY)
    with pytest.raises(OptionError, match="takes 80 of a micro-batch.*at least 80.*max_length to at most 64"):
        first_fit(samples, CAPACITY, 16)


def test_verifying_finds_samples_that_are_missing_or_twice_there_and_broken_orders():
    a, b = Sample("a", 0, 0, 40), Sample("a", 1, 0, 40)
    how = {"capacity": CAPACITY, "multiple": 1, "stages": 2}
    verify([(a,), (), (b,)], [a, b], **how)
    for broken in ([(a,), (), (a,), (b,)], [(a,)]):
        with pytest.raises(LorryError, match="every sample once"):
            verify(broken, [a, b], **how)
    with pytest.raises(LorryError, match="2 stages"):
        verify([(a,), (b,)], [a, b], **how)
    with pytest.raises(LorryError, match="above the capacity"):
        verify([(a, Sample("c", 0, 0, 40))], [a, Sample("c", 0, 0, 40)], **how)
