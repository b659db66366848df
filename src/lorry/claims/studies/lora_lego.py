"""Claims of LoRA-LEGO: clusters of rank units as one adapter, its two reweightings, and pruning."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import lorry

from ..ledger import Finding, Panel, Setting, claim
from ..verdicts import Trial, compare, together
from ._digit_merges import (
    FAIR,
    SETUP,
    STEPS,
    Course,
    Pool,
    Way,
    along,
    at,
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

#: Ranks of the result, as all inputs have rank 4: two and three times that are where a gain is expected.
RANKS = (4, 8, 12)
JUDGED = (8, 12)
LEGO, NONE, FACTORS = "both reweightings", "no reweighting", "factor average"
ABLATION: dict[str, dict[str, Any]] = {
    LEGO: {},
    "output only": {"unit_norm": "none"},
    "units only": {"output_norm": False},
    NONE: {"unit_norm": "none", "output_norm": False},
    "both, half-normalised, max-norm": {"feature": "half-normalised", "unit_norm": "linf"},
    "both, norms of A and B made equal": {"gauge": "norm"},
    "both, singular split": {"gauge": "svd"},
}
#: Other splits of the updates into factors than the paper's, which takes them as they were trained.
GAUGES = {"LEGO, norms of A and B made equal": "norm", "LEGO, singular split": "svd"}


def pools(setting: Setting) -> list[Pool]:
    """The adapters of each seed."""
    return [trained(seed, setting.much(STEPS, 2)) for seed in setting.seeds]


def by_rank(made: Sequence[Pool], ways: Mapping[str, Way]) -> dict[int, dict[str, list[Course]]]:
    """Measure every way at every rank of the result."""
    return {
        k: courses(made, {name: (method, {**options, "rank": k}) for name, (method, options) in ways.items()})
        for k in RANKS
    }


def over_ranks(values: Mapping[int, Mapping[str, Sequence[float]]], name: str) -> list[float]:
    """Mean of a contender over the ranks that are judged, by seed."""
    return [statistics.fmean(row) for row in zip(*(values[k][name] for k in JUDGED), strict=True)]


def tests(trials: Mapping[int, Trial]) -> dict[int, dict[str, list[float]]]:
    """Test accuracies at the best strength, by rank."""
    return {k: {name: metrics["test"] for name, metrics in one.metrics.items()} for k, one in trials.items()}


@claim(
    "lora-lego",
    "reweighting",
    says="Bringing centroids back to the size of their members, and scaling the output by the root of the ranks' "
    "ratio, makes clustered rank units a better adapter than without, and better than the factor average.",
    source="arXiv 2409.16167 (ICLR 2025), parameter and output reweighting",
    trial=SETUP
    + "Ranks 4, 8 and 12 of the result, 8 and 12 judged. At the method's own scale (weights 1/n), and again "
    "at each contender's best strength out of 12 on validation rows, since the output reweighting is nothing but a "
    "scale. Units are clustered as they were trained, as in the paper; two better defined splits of the updates are "
    "reported. Against: both reweightings are not above none, or not above the factor average, in either.",
)
def reweighting(setting: Setting) -> Finding:
    """Both reweightings against none and against the factor average, at the method's scale and at the best one."""
    made = pools(setting)
    found = by_rank(made, {name: ("lora-lego", options) for name, options in ABLATION.items()})
    average = courses(made, {FACTORS: ("linear", {})})
    plain = {k: at({**one, **average}, 1.0) for k, one in found.items()}
    trials = {k: best({**one, **average}) for k, one in found.items()}
    tuned = tests(trials)
    verdicts, parts = [], []
    for where, values in (("at weights 1/n", plain), ("at the best strengths", tuned)):
        lego, none, factors = (over_ranks(values, name) for name in (LEGO, NONE, FACTORS))
        verdicts += [compare(less(lego, none)), compare(less(lego, factors))]
        means = [statistics.fmean(v) for v in (lego, none, factors)]
        parts.append(f"{where} both {means[0]:.3f}, none {means[1]:.3f}, factor average {means[2]:.3f}")
    base = statistics.fmean(bare(pool)["test"] for pool in made)
    return Finding(
        together(verdicts),
        f"Mean over ranks 8 and 12: {'; '.join(parts)} (base {base:.3f}).",
        [
            Panel(title, "mean test accuracy", _curves(values), RANKS, "rank of the result")
            for title, values in (("At weights 1/n", plain), ("Best strength", tuned))
        ],
        notes=[
            "In order of the comparisons (above none, above the factor average; at 1/n, then tuned): "
            + ", ".join(verdicts)
            + ".",
            "The contender with half-normalised features and the max-norm is the reading of a third-party code base.",
            *(line for k, one in trials.items() for line in (f"Rank {k}: {strengths_note(one)[0]}", *one.notes)),
        ],
    )


def _curves(values: Mapping[int, Mapping[str, Sequence[float]]]) -> dict[str, list[Sequence[float]]]:
    """Series along the ranks."""
    return {name: [values[k][name] for k in RANKS] for name in values[RANKS[0]]}


@claim(
    "lora-lego",
    "against-others",
    says="LoRA-LEGO merges better on average than weight average, output ensemble, task arithmetic and TIES.",
    source="arXiv 2409.16167, abstract and main table (seven tasks, LLaMA-2-7B)",
    trial=SETUP
    + FAIR
    + "LEGO at rank 12; the output ensemble is the sum of the updates at weights 1/n. Against: one of the four is at "
    "least as good. The sum of the updates cut to the same rank is the control that is reported, at ranks 4, 8, 12, "
    "and so is LEGO on other splits of the same updates than the one they were trained in.",
)
def against_others(setting: Setting) -> Finding:
    """LEGO against four baselines, and against the truncated sum at equal rank."""
    made = pools(setting)
    splits: dict[str, Way] = {name: ("lora-lego", {"gauge": gauge}) for name, gauge in GAUGES.items()}
    found = by_rank(made, {"LEGO": ("lora-lego", {}), "sum cut by SVD": ("svd", {}), **splits})
    others = courses(made, {FACTORS: ("linear", {}), "task arithmetic": ("task-arithmetic", {}), "TIES": ("ties", {})})
    ensemble = at(others, 1.0)["task arithmetic"]
    top = max(RANKS)
    same = {name: found[top][name] for name in ("LEGO", *GAUGES)}
    trial = best({**same, f"sum cut to rank {top}": found[top]["sum cut by SVD"], **others})
    gains = {name: trial.gain("LEGO", name) for name in others}
    gains["output ensemble"] = less(trial.metrics["LEGO"]["test"], ensemble)
    axis = tests({k: best(one) for k, one in found.items()})
    return Finding(
        together([compare(gain) for gain in gains.values()]),
        f"LEGO at rank {top}: {trial.mean('LEGO'):.3f} ("
        + ", ".join(f"{name.removeprefix('LEGO, ')} {trial.mean(name):.3f}" for name in GAUGES)
        + "); "
        + ", ".join(f"{name} {trial.mean(name):.3f}" for name in others)
        + f", output ensemble {statistics.fmean(ensemble):.3f}. Cut sum at ranks {RANKS}: "
        + ", ".join(f"{statistics.fmean(axis[k]['sum cut by SVD']):.3f}" for k in RANKS)
        + "; LEGO there: "
        + ", ".join(f"{statistics.fmean(axis[k]['LEGO']):.3f}" for k in RANKS)
        + ".",
        [
            Panel("Best strength", "mean test accuracy", {**trial.of(), "output ensemble": [ensemble]}),
            Panel("Equal rank, best strength", "mean test accuracy", _curves(axis), RANKS, "rank of the result"),
            along("LEGO along the strength", {f"rank {k}": one["LEGO"] for k, one in found.items()}),
        ],
        notes=[
            f"In order: {listed(trial)}; each adapter on its own task {statistics.fmean(map(own, made)):.3f}.",
            "Rank 12 has three times the parameters of an input; the sum of the updates has rank 16.",
            *strengths_note(trial),
        ],
    )


@claim(
    "lora-lego",
    "pruning",
    says="Clustering the rank units of one adapter cuts its rank with little loss.",
    source="arXiv 2409.16167, section on pruning, as summarised by others; no figure was available",
    trial="A rank-8 LoRA on each of flip, rotate and shift of the digits (600 steps at 3e-3 on a frozen 64-128-128-10 "
    "perceptron), cut to ranks 6, 4, 2 and 1 by LEGO (its units as trained, and two other splits of the update) and by "
    "the singular values of its update, each at weight 1 and at its best strength out of 12 on validation rows. All "
    "are reported; there is no figure to hold them to.",
)
def pruning(setting: Setting) -> Finding:
    """LEGO and SVD as rank pruners."""
    views, ranks = ("flip", "rotate", "shift"), (6, 4, 2, 1)
    ways: dict[str, Way] = {"LEGO": ("lora-lego", {}), "SVD": ("svd", {})}
    ways |= {name: ("lora-lego", {"gauge": gauge}) for name, gauge in GAUGES.items()}
    plain: dict[str, list[list[float]]] = {name: [[] for _ in ranks] for name in ways}
    tuned: dict[str, list[list[float]]] = {name: [[] for _ in ranks] for name in ways}
    whole, bases = [], []
    for seed in setting.seeds:
        pool = trained(seed, setting.much(STEPS, 2), views=views, rank=8)
        whole.append(own(pool))
        bases.append(bare(pool)["test"])
        for name, way in ways.items():
            for place, rank in enumerate(ranks):
                runs = [_cut(pool.part([view]), way, rank) for view in views]
                plain[name][place].append(statistics.fmean(run[1.0]["test"] for run in runs))
                picked = [max(run.values(), key=_validation) for run in runs]
                tuned[name][place].append(statistics.fmean(one["test"] for one in picked))
    half = ranks.index(4)
    figures = ", ".join(
        f"{name} {statistics.fmean(plain[name][half]):.3f} ({statistics.fmean(tuned[name][half]):.3f} at its best "
        "strength)"
        for name in ways
    )
    reference = {"rank 8, not cut": [whole] * len(ranks), "base": [bases] * len(ranks)}
    return Finding(
        "reported",
        f"Cut from rank 8 to 4: {figures}; not cut {statistics.fmean(whole):.3f}, base {statistics.fmean(bases):.3f}.",
        [
            Panel(title, "mean test accuracy", {**values, **reference}, ranks, "rank after")
            for title, values in (("At weight 1", plain), ("Best strength", tuned))
        ],
        notes=[
            "Singular values give the best update of a rank in the Frobenius norm; LEGO sees units, not the update."
        ],
    )


def _cut(pool: Pool, way: Way, rank: int) -> Course:
    method, options = way
    found = course(pool, merged_by(pool, (method, {**options, "rank": rank})))
    lorry.activate(pool.network, None)
    return found


def _validation(row: Mapping[str, float]) -> float:
    return row["validation"]
