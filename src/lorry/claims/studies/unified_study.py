"""The two findings of the unified study of LoRA variants: what scores depend on, and who wins once rates are tuned."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lorry.training.study import Record, Study, StudyResult, analyse, run_study

from ..ledger import Finding, Panel, Setting, claim
from ..verdicts import compare, together
from ._unified_scenes import SCENES, Scene

#: Methods, a start, a ratio of rates and a scale: what is compared with LoRA.
VARIANTS: Mapping[str, Any] = {
    "lora": {"method": "lora"},
    "rslora": {"method": "rslora"},
    "lora-plus": {"method": "lora", "dynamics": "lora-plus"},
    "dora": {"method": "dora"},
    "pissa": {"method": "pissa"},
    "lora-fa": {"method": "lora", "dynamics": "lora-fa"},
    "mos-lora": {"method": "mos-lora"},
    "loha": {"method": "loha"},
}
SOURCE = "arXiv 2601.22708, abstract"
TRIAL = (
    "Three bases, frozen: the pocket model learns a skill (token accuracy), a perceptron trained on upright digits "
    "learns rotated ones (accuracy), and the last layer of all-MiniLM-L6-v2 learns short film reviews of SST-2 beside "
    "a new head (accuracy; with --data FOLDER). Adam, a cosine, five rates half a decade apart. "
)


def compared(scene: Scene, setting: Setting, **changes: Any) -> StudyResult:
    """Run a study of the scene, by default of all variants at rank 8 and the middle batch size."""
    with tempfile.TemporaryDirectory() as folder:
        values: dict[str, Any] = {
            "base": scene.name,
            "out": str(Path(folder)),
            "job": {**scene.job, "schedule": "cosine"},
            "variants": VARIANTS,
            "rates": scene.rates,
            "ranks": (8,),
            "batch_sizes": scene.batch_sizes[1:2],
            "seeds": setting.seeds,
            "test": scene.test,
            "score": scene.score,
            "better": "max",
            "diverged": None,
            "timed_steps": 0,
            "checkpoint_every": 0,
        }
        return run_study(Study.from_dict({**values, **changes}), scene.load)


def scenes(setting: Setting) -> tuple[list[Scene], list[str]]:
    """Return the scenes that can be had here, and what is to be said of the others."""
    made = {name: make(setting) for name, make in SCENES.items()}
    missing = [name for name, scene in made.items() if scene is None]
    notes = [f"Left out, for want of data or weights: {', '.join(missing)}."] if missing else []
    return [scene for scene in made.values() if scene is not None], notes


def _shares(records: Sequence[Record], seeds: Sequence[int]) -> dict[str, list[float]]:
    """Return the parts of the variance of scores seed by seed."""
    each = [analyse([r for r in records if r.seed == seed], "accuracy", "max").shares for seed in seeds]
    return {name: [shares[name] or 0.0 for shares in each] for name in each[0]}


@claim(
    "unified-study",
    "rate-matters-most",
    says="LoRA and its variants are far more sensitive to the learning rate than to other hyper-parameters.",
    source=SOURCE,
    trial=f"{TRIAL}LoRA (on digits DoRA and PiSSA too) at all rates, three ranks up to 10 or 32 and three batch sizes, "
    "four times as large at most. Statements, for each base: the learning rate explains more of the variance of test "
    "scores than the rank, and more than the batch size (analysis of variance of the runs of each seed, type II; what "
    "a rate does to one variant only is counted apart).",
)
def rate_matters_most(setting: Setting) -> Finding:
    """Compare what the scores depend on."""
    found, notes = scenes(setting)
    verdicts, panels, said = [], [], []
    for scene in found:
        variants = {name: VARIANTS[name] for name in scene.crossed}
        result = compared(scene, setting, variants=variants, ranks=scene.ranks, batch_sizes=scene.batch_sizes)
        shares = _shares(result.records, setting.seeds)
        for other in ("rank", "batch_size"):
            pairs = zip(shares["rate"], shares[other], strict=True)
            verdicts.append(compare([rate - less for rate, less in pairs]))
        named = {name.replace("_", " "): [values] for name, values in shares.items()}
        panels.append(Panel(scene.name, "part of the variance", named))
        mean = {name: statistics.fmean(values) for name, values in shares.items()}
        said.append(
            f"{scene.name}: rate {mean['rate']:.0%}, rank {mean['rank']:.0%}, batch size {mean['batch_size']:.0%}"
        )
        notes.append(f"{scene.name}: {len(result.records)} runs, {_ended(result)}.")
    return Finding(together(verdicts), f"Parts of the variance of test scores: {'; '.join(said)}.", panels, notes=notes)


@claim(
    "unified-study",
    "tuned-lora-matches",
    says="With proper configuration LoRA matches or surpasses most of its variants.",
    source=SOURCE,
    trial=f"{TRIAL}LoRA, rsLoRA, LoRA+, DoRA, PiSSA, LoRA-FA, MosLoRA and LoHa at rank 8; rates are chosen on held-out "
    "rows, the grid is widened by at most two where the best rate is at its end, scores are those of test rows. "
    "Statements, for each base: at the one rate that is best for all together, the standard deviation of the "
    "variants' scores is at least twice that of their scores at their own best rates, on every seed; and LoRA's mean "
    "is not below that of the median variant by more than the standard deviation over seeds (mean of the variants').",
)
def tuned_lora_matches(setting: Setting) -> Finding:
    """Compare variants at one rate for all, and each at its own."""
    found, notes = scenes(setting)
    verdicts, panels, said = [], [], []
    rates: dict[str, float] = {}
    for scene in found:
        result = compared(scene, setting, widen=2)
        analysis = result.analysis
        standing = {s.variant: s for s in analysis.standings if s.mean is not None and s.rate is not None}
        shared = analysis.shared
        assert shared is not None and analysis.best_spread is not None
        at = {(r.variant, r.rate, r.seed): r.test or 0.0 for r in result.records}
        twice = []
        for seed in setting.seeds:
            one = statistics.stdev(at.get((name, shared.rate, seed), 0.0) for name in standing)
            own = statistics.stdev(at[name, float(s.rate or 0), seed] for name, s in standing.items())
            twice.append(one - 2 * own)
        means = {name: float(s.mean or 0) for name, s in standing.items()}
        behind = statistics.median(means.values()) - means["lora"]
        over_seeds = statistics.fmean(s.spread or 0.0 for s in standing.values())
        verdicts += [compare(twice, -1e-9), compare([over_seeds - behind], -1e-9)]
        said.append(
            f"{scene.name}: standard deviation of the variants {shared.spread:.3f} at one rate ({shared.rate:g}), "
            f"{analysis.best_spread:.3f} at their own; LoRA {means['lora']:.3f}, median variant "
            f"{statistics.median(means.values()):.3f}, over seeds ± {over_seeds:.3f}"
        )
        panels.append(_curves(scene, result.records))
        rates |= {f"{name}, {scene.name}": float(s.rate or 0) for name, s in standing.items()}
        notes.append(f"{scene.name}: {len(result.records)} runs, {_ended(result)}.")
        lost = {name: s.sensitivity for name, s in standing.items() if s.sensitivity is not None}
        notes.append(
            f"{scene.name}: lost a decade from the best rate, "
            + ", ".join(f"{n} {v:.3f}" for n, v in lost.items())
            + "."
        )
    return Finding(together(verdicts), f"{'. '.join(said)}.", panels, rates, notes)


def _curves(scene: Scene, records: Sequence[Record]) -> Panel:
    """Test scores over the rates of the grid."""
    series = {}
    for name in dict.fromkeys(r.variant for r in records):
        own = [r for r in records if r.variant == name]
        series[name] = [[r.test or 0.0 for r in own if r.rate == rate] or [0.0] for rate in scene.rates]
    return Panel(scene.name, f"test {scene.score.replace('_', ' ')}", series, scene.rates, "rate", log_x=True)


def _ended(result: StudyResult) -> str:
    lost = sum(r.status != "done" for r in result.records)
    return "all of which ended" if not lost else f"{lost} of which did not end and count as the worst score"
