"""Factors side by side: whatever came and went, each adapter's rows are its A and its scaled B."""

import random

import torch
from serving.tiny_engines import adapt, engine, tiny

from lorry.serving.paging.arena import Arena

OPTIONS = [
    {"method": "lora", "rank": 3, "alpha": 6},
    {"method": "lora", "rank": 8},
    {"method": "lora", "rank": 1},
    {"method": "rslora", "rank": 5},
    {"method": "lora", "rank": 16},
]


def factors_of():
    """Return an engine and the factors of adapters on different sites, paged in."""
    model = tiny()
    for number, options in enumerate(OPTIONS):
        adapt(model, f"a{number}", options, targets=["q_proj", "up_proj"] if number % 2 else "all-linear", seed=number)
    machine = engine(model)
    versions = [machine._catalogue.acquire({f"a{number}": 1.0})[0][0] for number in range(len(OPTIONS))]
    for version in versions:
        machine._pool.use(version.resident)
    return machine, [version.factors for version in versions]


def check(arena):
    """Raise `AssertionError` unless every row is what it should be, and no two adapters have a unit in common."""
    taken = [unit for factors, first in arena.held.items() for unit in range(first, first + factors.rank)]
    assert len(taken) == len(set(taken))
    for factors, first in arena.held.items():
        for path, site in factors.sites.items():
            a, b = factors.ready(path)
            rows = slice(first, first + site.rank)
            assert torch.equal(arena.at(path)[0][rows], a)
            torch.testing.assert_close(arena.at(path)[1][rows], b.t() * site.scale, atol=0, rtol=1e-15)


def test_adapters_come_and_go():
    machine, every = factors_of()
    draw, arena = random.Random(0), Arena(torch.float64, torch.device("cpu"))
    for _ in range(40):
        wanted = draw.sample(every, draw.randint(1, 4))
        arena.hold(wanted)
        assert set(wanted) <= set(arena.held)
        check(arena)
        if draw.random() < 0.2:
            arena.forget(wanted[0].resident)
            assert wanted[0] not in arena.held
    # room for those that are wanted together, and not for all there are
    assert len(arena._taken) <= 2 * sum(sorted(factors.rank for factors in every)[-4:])
    machine.close()


def test_what_was_used_longest_ago_makes_room():
    machine, (small, _, tiny_one, middle, _) = factors_of()
    arena = Arena(torch.float64, torch.device("cpu"))
    arena.hold([middle, small])
    arena.hold([middle])
    arena.hold([tiny_one])
    assert set(arena.held) == {middle, tiny_one}
    check(arena)
    machine.close()


def test_factors_on_scattered_pages_are_the_same():
    machine, every = factors_of()
    whole, scattered = Arena(torch.float64, torch.device("cpu")), Arena(torch.float64, torch.device("cpu"))
    whole.hold(every)
    for factors in every:
        machine._pool.leave(factors.resident)
        machine._pool.drop(factors.resident)
    loose = [machine._pool.take(1) for _ in range(machine._pool.tokens.free)]
    for blocks in loose[::2]:  # every second page is free, so none lie together
        machine._pool.release(blocks)
    for factors in every:
        machine._pool.use(factors.resident)
    assert any(len(factors.resident.lease.runs) > 1 for factors in every)
    scattered.hold(every)
    check(scattered)
    machine.close()
