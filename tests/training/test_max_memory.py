"""Memory of training that is bounded: what is live at the highest point stays within, and most of it is used."""

import pytest
import torch
from training.tiny_bases import tiny_llama, token_rows

from lorry.bench._count import peak
from lorry.core.errors import OptionError
from lorry.core.life.api import adapters
from lorry.training import Fleet, Job
from lorry.training.joint import train_pass
from lorry.training.pass_planner import planner_from

LIMIT = 3_000_000


def jobs(**more):
    common = {"max_length": 32, "batch_size": 2, "steps": 12, "targets": "attention", **more}
    return [Job(name, token_rows(60, (30, 32), 1), "lora", seed=i, **common) for i, name in enumerate("ab")]


def live(fleet):
    """Bytes that lie in memory between passes: weights, adapters, gradients, states of optimizers."""
    found = {id(t): t for t in (*fleet.model.parameters(), *fleet.model.buffers())}
    for run in fleet.runs:
        for parameter in run.adapter.parameters():
            found |= {id(t): t for t in (parameter, parameter.grad) if t is not None}
        states = (value for state in run.optimizer.state.values() for value in state.values())
        found |= {id(t): t for t in states if torch.is_tensor(t)}
    return sum(t.numel() * t.element_size() for t in found.values())


@pytest.mark.parametrize("planner", ["lorafusion", "joined"])
def test_the_largest_pass_takes_what_was_allowed(planner, tmp_path):
    work = jobs(batch_size=40 if planner == "lorafusion" else 2)
    fleet = Fleet(tiny_llama(), None, work, tmp_path, planner=planner, max_memory=LIMIT, max_pad_ratio=None)
    fleet._tick()  # states of optimizers are there from now on
    highest = 0
    with fleet.base.mode(training=True):
        for run in fleet.runs:
            run.open_step()
        for group in fleet.planner.passes(fleet.rounds.shares({run.name: run for run in fleet.runs})):
            before = live(fleet)
            highest = max(highest, before + peak(lambda group=group: train_pass(fleet.base, group, 0)))
            assert all(share.error is None for share in group)
    assert highest < 1.1 * LIMIT
    assert planner == "joined" or highest > 0.8 * LIMIT


def test_a_bound_makes_passes_smaller_and_never_larger():
    model = tiny_llama()
    found = planner_from("lorafusion").within(model, jobs(), LIMIT).capacity
    assert 32 <= planner_from("lorafusion").within(model, jobs(), LIMIT // 2).capacity < found < 4096
    small = planner_from({"planner": "lorafusion", "capacity": found // 2})
    assert small.within(model, jobs(), LIMIT) == small


def test_bounds_that_cannot_be_kept_are_refused_with_what_to_do(tmp_path):
    for planner, limit, said in (
        ("joined", 1_500_000, "'a' has batches of 64. Set its batch_size to at most"),
        ("joined", 100_000, "one row of 32 tokens takes .* Raise it, lower max_length"),
        ("lorafusion", 100_000, "Raise it, train fewer jobs"),
    ):
        model = tiny_llama()
        with pytest.raises(OptionError, match=said):
            Fleet(model, None, jobs(batch_size=64), tmp_path, planner=planner, max_memory=limit)
        assert not adapters(model)
