"""Claims of DO-Merging: magnitudes and directions merged apart, and the orthogonalisation before it."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import replace
from functools import cache

import lorry
from lorry.merging import MergedAdapter

from ..ledger import Finding, Panel, Setting, claim
from ..verdicts import Trial, compare, together
from ._digit_merges import (
    FAIR,
    RATE,
    SETUP,
    STEPS,
    VIEWS,
    Pool,
    Way,
    bare,
    best,
    course,
    courses,
    less,
    listed,
    merged_by,
    own,
    strengths_note,
    trained,
)

#: Largest learning rate of an adapter over the smallest; the unequal ones are judged.
SPREADS = (1, 3, 9)
JUDGED = (3, 9)
TA, APART, EQUAL, FULL = "task arithmetic", "apart (D)", "equal norms, then added", "orthogonal and apart (O + D)"
WAYS: dict[str, Way] = {
    TA: ("task-arithmetic", {}),
    APART: ("do-merging", {"steps": 0}),
    "D, directions renormalised": ("do-merging", {"steps": 0, "renormalise": True}),
    EQUAL: ("norm-consistent", {}),
    FULL: ("do-merging", {}),
}
UNEQUAL = (
    "The rates of the four are spread around that, the largest 1, 3 or 9 times the smallest, and dealt out anew for "
    "each seed, so that the updates differ in size. "
)


@cache
def unequal(seed: int, spread: int, steps: int) -> Pool:
    """Adapters whose rates are a geometric row from ``RATE / √spread`` to ``RATE √spread``, dealt out by the seed."""
    rates = [RATE * spread ** (place / (len(VIEWS) - 1) - 0.5) for place in range(len(VIEWS))]
    dealt = {view: rates[(place + seed) % len(VIEWS)] for place, view in enumerate(VIEWS)}
    return trained(seed, steps, dealt)


@cache
def multiplied(seed: int, steps: int) -> Pool:
    """Adapters of equal rates, each multiplied by a number from 1/2 to 2, a geometric row dealt out by the seed."""
    pool, adapters = unequal(seed, 1, steps), {}
    for place, view in enumerate(VIEWS):
        factor = 4 ** ((place + seed) % len(VIEWS) / (len(VIEWS) - 1) - 0.5)
        own_adapter = pool.adapters[view]
        copy = lorry.attach(pool.network, own_adapter.method, name=f"{view}-multiplied", activate=False).train(False)
        for path, entry in copy.entries.items():
            tensors = own_adapter.entries[path].tensors()
            entry.home.replace("A", tensors["A"].detach().clone())
            entry.home.replace("B", tensors["B"].detach() * factor)
        adapters[view] = copy
    return replace(pool, adapters=adapters)


def pools(setting: Setting, spread: int) -> list[Pool]:
    """The adapters of each seed."""
    return [unequal(seed, spread, setting.much(STEPS, 2)) for seed in setting.seeds]


def variation(pool: Pool) -> float:
    """Coefficient of variation of the norms of the whole updates."""
    norms = [
        sum(float(delta.square().sum()) for _, delta in adapter.deltas()) ** 0.5 for adapter in pool.adapters.values()
    ]
    return statistics.pstdev(norms) / statistics.fmean(norms)


def judged(trials: Mapping[int, Trial], name: str) -> list[float]:
    """Test accuracy of a contender over the unequal spreads, by seed."""
    return [statistics.fmean(row) for row in zip(*(trials[s].metrics[name]["test"] for s in JUDGED), strict=True)]


@claim(
    "do-merging",
    "decouple",
    says="Merging the lengths and the directions of the updates' columns apart beats adding the updates where they "
    "differ in size.",
    source="arXiv 2505.15875, abstract and the part on decoupling",
    trial=SETUP
    + UNEQUAL
    + "The small ones are then trained less, so a second set has equal rates, and its updates are multiplied by "
    "numbers from 1/2 to 2. "
    + FAIR
    + "Against: task arithmetic is as good, on the mean over the spreads 3 and 9, or on the second set. The control "
    "that must be read beside it gives all updates of a layer one Frobenius norm and adds them.",
)
def decouple(setting: Setting) -> Finding:
    """Lengths and directions apart against the sum, and against the sum of updates of one norm."""
    made = {spread: pools(setting, spread) for spread in SPREADS}
    found = {spread: courses(own_pools, WAYS) for spread, own_pools in made.items()}
    trials = {spread: best(one) for spread, one in found.items()}
    apart, ta, equal = (judged(trials, name) for name in (APART, TA, EQUAL))
    large = [multiplied(seed, setting.much(STEPS, 2)) for seed in setting.seeds]
    second = best(courses(large, WAYS))
    both = [compare(less(apart, ta)), compare(second.gain(APART, TA))]
    spreads = {spread: [variation(pool) for pool in own_pools] for spread, own_pools in made.items()}
    limits = [statistics.fmean(own(pool) for pool in made[spread]) for spread in SPREADS]
    base = statistics.fmean(bare(pool)["test"] for pool in made[1])
    series = {name: [trials[s].metrics[name]["test"] for s in SPREADS] for name in WAYS}
    per_spread = ", ".join(f"{s}: {compare(trials[s].gain(APART, TA))}" for s in SPREADS)
    mean = statistics.fmean
    return Finding(
        together(both),
        f"Rates spread 3 and 9 times: apart {mean(apart):.3f}, task arithmetic {mean(ta):.3f}, the sum of updates of "
        f"one norm {mean(equal):.3f}. Updates multiplied: {second.mean(APART):.3f}, {second.mean(TA):.3f}, "
        f"{second.mean(EQUAL):.3f}.",
        [
            Panel("Rates", "mean test accuracy", series, SPREADS, "largest rate over smallest", log_x=True),
            Panel("Updates multiplied by 1/2 to 2", "mean test accuracy", second.of()),
        ],
        notes=[
            f"Verdicts with spread rates and with multiplied updates: {both[0]}, {both[1]}.",
            f"Multiplied updates: variation {mean(variation(pool) for pool in large):.2f}, each on its own task "
            f"{mean(own(pool) for pool in large):.3f}.",
            *strengths_note(second),
            "Variation of the norms (standard deviation over mean), by spread: "
            + ", ".join(f"{s}: {mean(values):.2f}" for s, values in spreads.items())
            + ".",
            "Each adapter on its own task, by spread: "
            + ", ".join(f"{value:.3f}" for value in limits)
            + f"; base {base:.3f}.",
            f"Apart against task arithmetic by spread: {per_spread}.",
            *(f"Spread {s}: {listed(one)}." for s, one in trials.items()),
            *(f"Spread {s}: {line}" for s, one in trials.items() for line in strengths_note(one)),
        ],
    )


SEARCH = (0, 1, 3, 10, 100)


@claim(
    "do-merging",
    "orthogonalise",
    says="Moving the factors of different adapters a little apart, so that they become orthogonal, improves the merge "
    "further.",
    source="arXiv 2505.15875, abstract: each component improves existing methods",
    trial=SETUP
    + UNEQUAL
    + FAIR
    + "At spreads 1 and 9, with 0, 1, 3, 10 and 100 steps of the search at most, and a displacement of 10 % at most "
    "as a variant. Against: the default, 100 steps, is not above none.",
)
def orthogonalise(setting: Setting) -> Finding:
    """The merge with and without orthogonalisation, along its steps."""
    ways: dict[str, Way] = {f"{n} steps": ("do-merging", {"steps": n}) for n in SEARCH}
    ways["100 steps, moved 10 % at most"] = ("do-merging", {"cap": 0.1})
    trials, moved, verdicts = {}, {}, []
    for spread in (1, 9):
        merges = {name: [(p, merged_by(p, way)) for p in pools(setting, spread)] for name, way in ways.items()}
        trials[spread] = best({name: [course(p, one) for p, one in rows] for name, rows in merges.items()})
        moved[spread] = {name: [facts(one) for _, one in rows] for name, rows in merges.items()}
        verdicts.append(compare(trials[spread].gain("100 steps", "0 steps")))
    mean = statistics.fmean
    without, full = ([mean(t.metrics[f"{n} steps"]["test"]) for t in trials.values()] for n in (0, 100))
    shares = {s: [mean(one[i] for one in moved[s]["100 steps"]) for i in (0, 1)] for s in trials}
    axis = [n for n in SEARCH if n]
    return Finding(
        together(verdicts),
        f"With 100 steps {full[0]:.3f} and without {without[0]:.3f} at equal rates, {full[1]:.3f} and {without[1]:.3f} "
        f"at spread 9, where the factors moved by {shares[9][0]:.0%} of their norm and the overlap fell to "
        f"{shares[9][1]:.3%} of its start.",
        [
            Panel(
                "Best strength",
                "mean test accuracy",
                {f"spread {s}": [t.metrics[f"{n} steps"]["test"] for n in SEARCH] for s, t in trials.items()},
                SEARCH,
                "steps at most",
            ),
            Panel(
                "Displacement",
                "moved, as a share of the factors' norm",
                {f"spread {s}": [[one[0] for one in moved[s][f"{n} steps"]] for n in axis] for s in trials},
                axis,
                "steps at most",
                log_x=True,
            ),
        ],
        notes=[
            *(f"Spread {s}: {listed(one)}." for s, one in trials.items()),
            *(f"Spread {s}: {line}" for s, one in trials.items() for line in strengths_note(one)),
        ],
    )


def facts(merged: MergedAdapter) -> tuple[float, float]:
    """Displacement of the factors, and the overlap after over before, means over sites and sides."""
    sides = [
        site.facts[key] for site in merged.receipt.sites for key in ("overlap_a", "overlap_b") if key in site.facts
    ]
    if not sides:
        return 0.0, 1.0
    return statistics.fmean(s["displacement"] for s in sides), statistics.fmean(
        s["after"] / s["before"] for s in sides if s["before"]
    )
