"""DEYOLO: its fusion against single modalities and simpler fusions, where each object is seen by one camera."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from functools import cache

from lorry.claims.ledger import Finding, Panel, Setting, claim
from lorry.claims.verdicts import Trial, best_rate, compare, together, widened
from lorry.systems.deyolo import Plan, toy
from lorry.systems.deyolo.compare import CONTENDERS, DEA, EARLY, FLIP, INFRARED, RGB, SUM, UNCROSSED, measured, trained

PAIRS, CHOOSING, HELD_OUT, STEPS = 600, 100, 200, 400
#: Rates are chosen with one seed more, on pairs of their own, in half the steps.
RATES, TUNING_SEED = (1e-2, 2e-2, 4e-2), 100
#: A clear lead, in points of mAP50 within 0 to 1.
CLEAR = 0.1
TRIAL = (
    "Pairs of 64 x 64 pixels with one to three handwritten digits (0 and 1) on crops of two photographs; every second "
    "digit is pasted into RGB alone, the others into infrared alone. Backbones of four strides with 8 to 16 channels, "
    "a small neck and torchvision's FCOS head; 600 pairs, 400 steps of 16; held-out digits and crops. Each contender "
    "has its own rate, chosen on other pairs with another seed. "
)


@cache
def contest(setting: Setting) -> Trial:
    """Tune and train all contenders; each metric by seed."""
    metrics, rates, notes = {}, {}, []
    steps, pairs = setting.much(STEPS, 4), setting.much(PAIRS, 16)
    choosing = toy(setting.much(CHOOSING, 4), TUNING_SEED + 1)
    for name in CONTENDERS:

        def at(rate: float, name: str = name) -> Sequence[dict[str, float]]:
            plan = Plan(max(2, steps // 2), rate, flip=FLIP)
            model = trained(name, toy(pairs, TUNING_SEED), plan, TUNING_SEED)
            return [{"validation": measured(model, choosing)["map50"]}]

        tried = widened(at, RATES)
        rates[name] = best_rate(tried)
        if rates[name] in (min(tried), max(tried)):
            notes.append(f"The best rate of {name}, {rates[name]:g}, is at the edge of its grid.")
        runs = []
        for seed in setting.seeds:
            model = trained(name, toy(pairs, seed), Plan(steps, rates[name], flip=FLIP), seed)
            runs.append(measured(model, toy(setting.much(HELD_OUT, 4), seed, held_out=True)))
        metrics[name] = {key: [each[key] for each in runs] for key in runs[0]}
    return Trial(metrics, rates, tuple(notes))


def shown(trial: Trial, metric: str = "map50") -> str:
    """Return the mean of each contender in words."""
    return ", ".join(f"{name} {trial.mean(name, metric):.3f}" for name in CONTENDERS)


@claim(
    "deyolo",
    "modalities",
    says="Two backbones with features fused by DEA find more than either modality alone (LLVIP, size n, by a third "
    "party: 0.952 mAP50 against 0.891 of RGB).",
    source="arXiv 2412.04931, abstract; third-party reproduction",
    trial=TRIAL + "Counted as reproduced if DEA leads both single modalities by 0.1 mAP50 on every seed.",
)
def modalities(setting: Setting) -> Finding:
    """DEA against RGB alone and infrared alone."""
    trial = contest(setting)
    statements = [compare(trial.gain(DEA, over, "map50"), CLEAR) for over in (RGB, INFRARED)]
    leads = [statistics.fmean(trial.gain(DEA, over, "map50")) for over in (RGB, INFRARED)]
    return Finding(
        together(statements),
        f"mAP50: {shown(trial)}. DEA leads RGB by {leads[0]:.3f} and infrared by {leads[1]:.3f}.",
        [Panel("mAP50 on held-out pairs", "mAP50", trial.of("map50"))],
        trial.rates,
        trial.notes,
    )


@claim(
    "deyolo",
    "fusions",
    says="Features fused by DEA are better than fused pictures (M3FD, all classes: about 87 to 91 mAP50 against 80 to "
    "82 of fusion networks before a detector); a third party finds early fusion of six channels as good.",
    source="arXiv 2412.04931, abstract and figure of M3FD; third-party reproduction",
    trial=TRIAL + "Sources disagree on simple fusions, so that the differences are reported. Early fusion has one "
    "backbone, hence about half of the parameters. At the end the pixels of one modality are set to zero.",
)
def fusions(setting: Setting) -> Finding:
    """DEA against early fusion, the sum of features and DEA without crossing, and with one modality missing."""
    trial = contest(setting)
    gains = {over: trial.gain(DEA, over, "map50") for over in (EARLY, SUM, UNCROSSED)}
    against = ", ".join(f"{over} {statistics.fmean(gain):+.3f}" for over, gain in gains.items())
    lost = {key: trial.mean(DEA, key) for key in ("no rgb", "no ir")}
    return Finding(
        "reported",
        f"mAP50: {shown(trial)}. DEA against {against}. Without RGB DEA keeps {lost['no rgb']:.3f}, without infrared "
        f"{lost['no ir']:.3f}.",
        [
            Panel("mAP50 on held-out pairs", "mAP50", trial.of("map50")),
            Panel("Without the RGB picture", "mAP50", trial.of("no rgb")),
            Panel("Without the infrared picture", "mAP50", trial.of("no ir")),
        ],
        trial.rates,
        trial.notes,
    )
