"""Claims of the merges that every other one is compared with: task arithmetic, TIES, DARE, KnOTS."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

from ..ledger import Finding, Panel, Setting, claim
from ..verdicts import chosen, compare, together
from ._digit_merges import (
    FAIR,
    SETUP,
    STEPS,
    Course,
    Pool,
    along,
    at,
    bare,
    best,
    courses,
    less,
    listed,
    own,
    strengths_note,
    trained,
)

DENSITIES = (0.1, 0.2, 0.5, 0.8, 1.0)
TA, FACTORS = "task arithmetic", "factor average"


def pools(setting: Setting) -> list[Pool]:
    """The adapters of each seed."""
    return [trained(seed, setting.much(STEPS, 2)) for seed in setting.seeds]


@claim(
    "merging-baselines",
    "task-arithmetic",
    says="Adding the updates at a tuned strength makes one adapter that is better on all tasks than the base, and "
    "better than averaging the factors A and B.",
    source="Task Arithmetic, arXiv 2212.04089; LoraHub's and PEFT's factor average as the contrast",
    trial=SETUP
    + FAIR
    + "Against: the base or the tuned factor average reaches the mean test accuracy of task arithmetic. The factor "
    "average without tuning, and TIES, DARE, KnOTS and the sum cut to rank 4 are reported beside.",
)
def task_arithmetic(setting: Setting) -> Finding:
    """Task arithmetic against base and factor average."""
    made = pools(setting)
    found = courses(
        made,
        {
            TA: ("task-arithmetic", {}),
            FACTORS: ("linear", {}),
            "sum cut to rank 4": ("svd", {"rank": 4}),
            "TIES": ("ties", {}),
            "DARE": ("dare", {}),
            "DARE-TIES": ("dare-ties", {}),
            "KnOTS-TIES": ("knots-ties", {}),
        },
    )
    trial = best(found)
    plain = at(found, 1.0)
    base = [bare(pool)["test"] for pool in made]
    over_base = less(trial.metrics[TA]["test"], base)
    over_factors = trial.gain(TA, FACTORS)
    untuned = {f"{name}, weights 1/n": [plain[name]] for name in (TA, FACTORS)}
    drift = [_cosine_of_a(pool) for pool in made]
    limit = [own(pool) for pool in made]
    return Finding(
        together([compare(over_base), compare(over_factors)]),
        f"Task arithmetic {trial.mean(TA):.3f}, base {statistics.fmean(base):.3f}, factor average "
        f"{trial.mean(FACTORS):.3f} at its best strength and {statistics.fmean(plain[FACTORS]):.3f} at weights 1/n, "
        f"where task arithmetic has {statistics.fmean(plain[TA]):.3f}; "
        f"each adapter on its own task {statistics.fmean(limit):.3f}.",
        [
            Panel("Best strength", "mean test accuracy", {"base": [base], **trial.of(), **untuned}),
            along("Along the strength", found),
        ],
        notes=[
            f"In order: {listed(trial)}.",
            f"Mean cosine between the A's of two adapters {statistics.fmean(drift):.2f}: all started from one A, and "
            "where the A's agree the factor average is task arithmetic.",
            "Densities: TIES and KnOTS-TIES keep 0.2, DARE and DARE-TIES 0.7 of the entries.",
            *strengths_note(trial),
        ],
    )


def _cosine_of_a(pool: Pool) -> float:
    """How alike the A's of two adapters still are, mean over sites and pairs."""
    found = []
    adapters = list(pool.adapters.values())
    for path in adapters[0].entries:
        flat = [one.entries[path].tensors()["A"].detach().flatten() for one in adapters]
        found += [float(a @ b / (a.norm() * b.norm())) for i, a in enumerate(flat) for b in flat[i + 1 :]]
    return statistics.fmean(found)


@claim(
    "merging-baselines",
    "knots",
    says="Aligning the updates in their joint singular basis first (KnOTS) improves TIES and DARE-TIES on LoRA.",
    source="KnOTS, arXiv 2410.19735 (ICLR 2025), tables on ViT-B/32, ViT-L/14 and Llama-3-8B",
    trial=SETUP
    + FAIR
    + "The density is chosen in the same way out of 0.1, 0.2, 0.5, 0.8 and 1. Against: a method without KnOTS is at "
    "least as good as with it.",
)
def knots(setting: Setting) -> Finding:
    """TIES and DARE-TIES with and without KnOTS."""
    made = pools(setting)
    by_density: dict[str, dict[float, list[Course]]] = {}
    for name, method in {
        "TIES": "ties",
        "KnOTS-TIES": "knots-ties",
        "DARE-TIES": "dare-ties",
        "KnOTS-DARE-TIES": "knots-dare-ties",
    }.items():
        ways = {f"{d}": (method, {"density": d}) for d in DENSITIES}
        by_density[name] = {float(d): found for d, found in courses(made, ways).items()}
    ta = best(courses(made, {TA: ("task-arithmetic", {})}))
    tuned = {name: {d: best({name: rows}) for d, rows in found.items()} for name, found in by_density.items()}
    trial = chosen({name: {d: _rows(one.metrics[name]) for d, one in found.items()} for name, found in tuned.items()})
    gains = [trial.gain(f"KnOTS-{name}", name) for name in ("TIES", "DARE-TIES")]
    axis = {name: [found[d].metrics[name]["test"] for d in DENSITIES] for name, found in tuned.items()}
    axis[TA] = [ta.metrics[TA]["test"]] * len(DENSITIES)
    picked = ", ".join(
        f"{name} {trial.rates[name]:g} (strength {tuned[name][trial.rates[name]].rates[name]:g})"
        for name in trial.rates
    )
    return Finding(
        together([compare(gain) for gain in gains]),
        f"With and without KnOTS: TIES {trial.mean('KnOTS-TIES'):.3f} and {trial.mean('TIES'):.3f}, DARE-TIES "
        f"{trial.mean('KnOTS-DARE-TIES'):.3f} and {trial.mean('DARE-TIES'):.3f}; task arithmetic {ta.mean(TA):.3f}.",
        [
            Panel("Best density and strength", "mean test accuracy", {**trial.of(), **ta.of()}),
            Panel("Best strength at each density", "mean test accuracy", axis, DENSITIES, "density"),
        ],
        notes=[f"Densities chosen: {picked}.", *(note.replace("rate", "density") for note in trial.notes)],
    )


def _rows(metrics: Mapping[str, Sequence[float]]) -> list[dict[str, float]]:
    """Metrics by seed again."""
    return [dict(zip(metrics, values, strict=True)) for values in zip(*metrics.values(), strict=True)]
