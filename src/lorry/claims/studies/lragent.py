"""LRAgent: what roles lose, and what they save, when they share the cache of the text that they work on."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

from lorry.claims.ledger import Finding, Panel, Setting, claim
from lorry.claims.studies._role_adapters import (
    ALPHA,
    BATCH,
    LINES,
    RANK,
    ROLES,
    STEPS,
    accuracy,
    distances,
    held_out_loss,
    similarity,
    trained,
)
from lorry.claims.verdicts import Rows, Trial, best_rate, chosen, compare, together, widened

RATES = (2e-3, 5e-3, 1e-2)
SHARING = ("full-shared", "base-shared", "base-lr-shared")
#: The scheme that keeps X A once, with roles whose A differ.
APART = "base-lr-shared, A apart"
TEXTS = 12

TRIAL = (
    f"Three roles on the pocket model, LoRA of rank {RANK} and alpha {ALPHA} on q_proj and v_proj for the skills "
    f"{', '.join(ROLES.values())}, trained in {STEPS} steps of {BATCH} rows: up to {LINES} lines of all roles, then "
    "one of its own. The second and third role have the first one's A at v_proj, frozen; beside them the same two "
    "with A of their own. One rate for all, the best by the held-out loss of the first role. Texts are of "
    f"{LINES + 1} lines of held-out words, each line of another role as it comes."
)


@cache
def _trial(setting: Setting) -> Trial:
    """Both claims look at the same roles."""

    def losses(rate: float) -> Rows:
        return [{"validation": -held_out_loss(setting, rate, seed)} for seed in setting.seeds]

    tuned = widened(losses, RATES)
    rate = best_rate(tuned)
    notes = chosen({"roles": tuned}).notes
    rows = [_row(setting, rate, seed) for seed in setting.seeds]
    return Trial({"roles": {key: [row[key] for row in rows] for key in rows[0]}}, {"roles": rate}, notes)


def _row(setting: Setting, rate: float, seed: int) -> Mapping[str, float]:
    count = setting.much(TEXTS, 2)
    row: dict[str, float] = {}
    with trained(setting, rate, seed) as (model, tokenizer):
        near = distances(model, tokenizer, False, SHARING, count, seed)
        row |= {f"divergence {policy}": value for policy, value in near.items()}
        far = distances(model, tokenizer, True, ("base-shared", "base-lr-shared"), count, seed)
        row |= {"divergence base-shared, A apart": far["base-shared"], f"divergence {APART}": far["base-lr-shared"]}
        for policy in ("non-shared", *SHARING):
            row[f"accuracy {policy}"] = accuracy(model, tokenizer, False, policy, count, seed)
        row["accuracy non-shared, A apart"] = accuracy(model, tokenizer, True, "non-shared", count, seed)
        row[f"accuracy {APART}"] = accuracy(model, tokenizer, True, "base-lr-shared", count, seed)
        row |= {f"cosine {what}": value for what, value in similarity(model, tokenizer, False, count, seed).items()}
        apart = similarity(model, tokenizer, True, count, seed)
    return row | {"cosine low-rank values, A apart": apart["low-rank values"]}


def _panel(trial: Trial, metric: str, title: str, unit: str) -> Panel:
    names = [name.removeprefix(f"{metric} ") for name in trial.metrics["roles"] if name.startswith(f"{metric} ")]
    return Panel(title, unit, {name: [trial.metrics["roles"][f"{metric} {name}"]] for name in names})


def _means(trial: Trial, metric: str, places: int) -> str:
    panel = _panel(trial, metric, "", "")
    return ", ".join(f"{name} {sum(v[0]) / len(v[0]):.{places}f}" for name, v in panel.series.items())


@claim(
    "lragent",
    "schemes",
    says="Of schemes that share a cache among roles, keeping the base's part of the values apart loses least, and "
    "sharing the adapters' part too loses little if roles have one A (LLaMA-3.1-8B, HotpotQA: non-shared 38.88, "
    "base-shared 38.60, base-lr-shared 37.92, full-shared 36.40; without one A 36.25).",
    source="arXiv 2602.01053, tables of accuracy",
    trial=f"{TRIAL} Divergence is that of the next token's distribution from caches of their own, on right answers. "
    "Statements: it is smaller for base-shared than for full-shared, smaller for base-lr-shared than for full-shared, "
    "and with A apart more than twice as large for base-lr-shared as for base-shared. Accuracy of answers, in texts "
    "that roles write themselves, is reported.",
)
def schemes(setting: Setting) -> Finding:
    """Compare what roles say under each scheme."""
    trial = _trial(setting)
    found = trial.metrics["roles"]

    def less(first: str, second: str, times: float = 1.0) -> str:
        pairs = zip(found[f"divergence {first}"], found[f"divergence {second}"], strict=True)
        return compare([b - times * a for a, b in pairs])

    verdict = together(
        [
            less("base-shared", "full-shared"),
            less("base-lr-shared", "full-shared"),
            less("base-shared, A apart", APART, times=2.0),
        ]
    )
    return Finding(
        verdict=verdict,
        summary=f"Divergence: {_means(trial, 'divergence', 4)}. Accuracy: {_means(trial, 'accuracy', 3)}.",
        panels=[
            _panel(trial, "divergence", "from caches of their own", "divergence, nats"),
            _panel(trial, "accuracy", "right answers", "accuracy"),
        ],
        rates=trial.rates,
        notes=trial.notes,
    )


@claim(
    "lragent",
    "similarity",
    says="Roles that read one text keep almost the same base values, less similar whole ones, and adapter outputs that "
    "have nothing in common (LLaMA-3.1-8B, mean cosine: base 0.9726, whole 0.9576, adapter outputs 0.0538, low-rank "
    "values of one A 0.949 to 0.963).",
    source="arXiv 2602.01053, section on the analysis of caches",
    trial=f"{TRIAL} Mean cosine over layers, heads, tokens and pairs of roles. Statements: base values above whole "
    "values; adapter outputs below 0.3; low-rank values of one A above those of A apart.",
)
def similar(setting: Setting) -> Finding:
    """Compare what roles keep of one text."""
    trial = _trial(setting)
    found = trial.metrics["roles"]
    base, whole, one, apart = (
        found[f"cosine {name}"] for name in ("base values", "values", "low-rank values", "low-rank values, A apart")
    )
    verdict = together(
        [
            compare([a - b for a, b in zip(base, whole, strict=True)]),
            compare([0.3 - value for value in found["cosine updates"]]),
            compare([a - b for a, b in zip(one, apart, strict=True)]),
        ]
    )
    return Finding(
        verdict=verdict,
        summary=f"Mean cosine: {_means(trial, 'cosine', 3)}.",
        panels=[_panel(trial, "cosine", "between roles", "mean cosine")],
        rates=trial.rates,
        notes=trial.notes,
    )
