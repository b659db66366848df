"""The simulated pipeline against times that can be worked out by hand, and the order of the ways of training."""

import statistics

import pytest
import torch

from lorry.core.errors import OptionError
from lorry.training.planning.order import Rules
from lorry.training.planning.simulation import BACKWARD, FORWARD, compared, long_tailed, simulated

BOTH = FORWARD + BACKWARD


def test_one_stage_takes_the_sum_and_is_never_idle():
    course = simulated([1000, 0, 3000], 1, layers=2)
    assert course.milliseconds == pytest.approx(4 * 2 * BOTH)
    assert (course.micro_batches, course.no_ops, course.tokens) == (2, 1, 4000)
    assert course.idle == pytest.approx(0.0)


@pytest.mark.parametrize(("count", "stages"), [(1, 4), (4, 4), (9, 3)])
def test_equal_micro_batches_take_the_time_of_one_forward_one_backward(count, stages):
    course = simulated([1000] * count, stages, layers=stages)
    assert course.milliseconds == pytest.approx((count + stages - 1) * BOTH)
    assert course.idle == pytest.approx((stages - 1) / (count + stages - 1))


def test_no_ops_between_steps_empty_the_pipeline():
    lone = simulated([1000], 4, layers=4).milliseconds
    assert simulated([1000, 0, 0, 0, 1000], 4, layers=4).milliseconds == pytest.approx(2 * lone)


def test_lengths_have_a_long_tail_and_come_from_the_generator():
    def drawn(seed):
        generator = torch.Generator().manual_seed(seed)
        return long_tailed(3, 5, 40, median=400, sigma=1.0, most=4096, generator=generator)

    assert drawn(1) == drawn(1) != drawn(2)
    flat = [n for steps in drawn(1).values() for batch in steps for n in batch]
    assert max(flat) <= 4096 and min(flat) >= 1
    assert statistics.fmean(flat) > 1.2 * statistics.median(flat)


def test_the_plan_beats_padding_with_locks_and_sequential_jobs_on_lengths_with_a_long_tail():
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        lengths = long_tailed(4, 3, 8, median=600, sigma=1.0, most=4096, generator=generator)
        ways = compared(lengths, Rules(4096, multiple=128, stages=4))
        times = {name: course.milliseconds for name, course in ways.items()}
        assert times["lorafusion"] < min(times["pad-concat"], times["sequential, packed"], times["sequential"])
        assert ways["sequential, packed"].tokens <= ways["sequential"].tokens <= ways["pad-concat"].tokens


def test_padding_with_locks_beats_sequential_jobs_where_lengths_are_alike():
    lengths = {f"job-{i}": [[500] * 8] * 3 for i in range(4)}
    ways = compared(lengths, Rules(2000, stages=4))
    times = {name: course.milliseconds for name, course in ways.items()}
    assert times["lorafusion"] <= times["pad-concat"] < times["sequential"]


def test_lengths_above_the_capacity_are_refused():
    with pytest.raises(OptionError, match="capacity to at least"):
        compared({"a": [[100]]}, Rules(64))
