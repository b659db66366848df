"""The claim of LiON-LoRA that needs no video model: updates of one size protect the weaker of two adapters."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from itertools import permutations

from lorry.merging import MergedAdapter, merge

from ..ledger import Finding, Panel, Setting, claim
from ..verdicts import Trial, compare, together
from ._digit_merges import (
    FAIR,
    STEPS,
    VIEWS,
    Course,
    Pool,
    Way,
    best,
    course,
    merged_by,
    own,
    strengths_note,
    trained,
)

LONGER = 5
SUM, EVEN = "plain sum", "norm-consistent"
WAYS: dict[str, Way] = {
    SUM: ("task-arithmetic", {}),
    EVEN: ("norm-consistent", {}),
    "norm-consistent, smallest norm": ("norm-consistent", {"norm": "min"}),
    "one ratio for an adapter": ("norm-consistent", {"across": "adapter"}),
}
#: One of the two is dropped: what a fair criterion must not take for a good fusion.
WEAK_ALONE, STRONG_ALONE = "the weaker alone", "the stronger alone"
CONTENDERS = (*WAYS, WEAK_ALONE, STRONG_ALONE)
WEAK, STRONG, BOTH = "error of the weaker", "error of the stronger", "mean error"


def protects(trial: Trial, name: str) -> list[float]:
    """By how much a fusion is better than the plain sum, seed by seed: on the weaker view, and on both together.

    The lesser of the two counts, so that what is won on the weaker view by giving up the stronger is no gain.
    """
    return [min(pair) for pair in zip(trial.gain(SUM, name, WEAK), trial.gain(SUM, name, BOTH), strict=True)]


@claim(
    "lion-lora",
    "norm-consistency",
    says="Bringing the updates of fused adapters to one size in every layer protects the weaker one from the stronger.",
    source="arXiv 2507.05678 (ICCV 2025), norm consistency; the paper gives it for camera motions of a video model",
    trial="A 64-128-128-10 perceptron trained on 8 x 8 digits and frozen; rank-4 LoRA for flip, noise, rotate "
    "and shift, each trained weakly (120 Adam steps of 64 rows at 3e-3) and strongly (600 steps); all 12 pairs of one "
    "strong and one weak adapter of two views are fused. "
    + FAIR.replace("over the views", "over both views of all pairs")
    + "Against: the test error on the weaker adapter's view, or the mean of both views' errors, is not below that of "
    "the plain sum. Each adapter alone stands beside them, as the fusion that drops the other; the criterion is "
    "applied to both, and must refuse them.",
)
def norm_consistency(setting: Setting) -> Finding:
    """The errors on both views with and without norm consistency, and with one adapter dropped."""
    found: dict[str, list[Course]] = {name: [] for name in CONTENDERS}
    ratios, alone = [], []
    for seed in setting.seeds:
        strong = trained(seed, setting.much(STEPS, LONGER))
        weak = trained(seed, max(1, setting.much(STEPS, LONGER) // LONGER))
        ratios.append([norm(strong, view) / norm(weak, view) for view in VIEWS])
        alone.append(1 - own(weak))
        pairs = [(_pair(strong, weak, a, b), b) for a, b in list(permutations(VIEWS, 2))[: setting.much(12, 2)]]
        for name in CONTENDERS:
            found[name].append(_average([(course(pool, _fused(pool, name, small)), small) for pool, small in pairs]))
    trial = best(found)
    sums = {name: statistics.fmean(one[2.0][WEAK] for one in rows) for name, rows in found.items()}
    means = {name: [trial.mean(name, metric) for metric in (WEAK, STRONG, BOTH)] for name in CONTENDERS}
    dropped = {name: together([compare(protects(trial, name))]) for name in (WEAK_ALONE, STRONG_ALONE)}
    return Finding(
        together([compare(protects(trial, EVEN))]),
        f"Error on the weaker view {means[EVEN][0]:.3f} with one size, {means[SUM][0]:.3f} without; on the stronger "
        f"{means[EVEN][1]:.3f} and {means[SUM][1]:.3f}, so on average over both {means[EVEN][2]:.3f} and "
        f"{means[SUM][2]:.3f}. With weights of 1, untuned, the weaker view has {sums[EVEN]:.3f} and {sums[SUM]:.3f}.",
        [
            Panel("The weaker view, best strength", "test error", trial.of(WEAK)),
            Panel("The stronger view, best strength", "test error", trial.of(STRONG)),
        ],
        notes=[
            f"The weak adapters alone have an error of {statistics.fmean(alone):.3f} on their views; the norms of the "
            f"strong ones are {statistics.fmean(map(statistics.fmean, ratios)):.1f} times theirs.",
            "Mean error over both views: " + ", ".join(f"{n} {values[2]:.3f}" for n, values in means.items()) + ".",
            "By the same criterion: " + ", ".join(f"{name} {verdict}" for name, verdict in dropped.items()) + ".",
            *strengths_note(trial),
        ],
    )


def _fused(pool: Pool, name: str, small: str) -> MergedAdapter:
    """The adapters of a pair fused in one way, or one of the two alone, at weights 1/n."""
    if name in WAYS:
        return merged_by(pool, WAYS[name])
    kept = {view: one for view, one in pool.adapters.items() if (view == small) == (name == WEAK_ALONE)}
    return merge(kept, method="task-arithmetic")


def norm(pool: Pool, view: str) -> float:
    """Frobenius norm of a whole update."""
    total = sum(float(delta.square().sum()) for _, delta in pool.adapters[view].deltas())
    return total**0.5


def _pair(strong: Pool, weak: Pool, large: str, small: str) -> Pool:
    """A strong and a weak adapter, on a network of the same weights."""
    adapters = {large: strong.adapters[large], small: weak.adapters[small]}
    return Pool(strong.network, {name: strong.tasks[name] for name in adapters}, adapters, strong.seed)


def _average(rows: list[tuple[Course, str]]) -> Course:
    """Errors of the weaker and of the stronger view, means over the pairs."""
    found: Course = {}
    for strength in rows[0][0]:
        here = [_errors(one[strength], small) for one, small in rows]
        found[strength] = {key: statistics.fmean(row[key] for row in here) for key in here[0]}
    return found


def _errors(row: Mapping[str, float], small: str) -> dict[str, float]:
    weak = row[f"test {small}"]
    return {
        "validation": row["validation"],
        WEAK: 1 - weak,
        STRONG: 1 - (2 * row["test"] - weak),
        BOTH: 1 - row["test"],
    }
