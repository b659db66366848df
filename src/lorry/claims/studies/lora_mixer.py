"""LoRA-Mixer: a router over LoRAs that exist, trained on few mixed lines, and what its loss does for it."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

import lorry
from lorry import pocket
from lorry.core.life.adapter import Adapter
from lorry.merging.mixture import from_adapters
from lorry.methods.parts.routing import input_router

from .. import words
from ..fitting import train
from ..ledger import Finding, Panel, Setting, claim
from ..verdicts import Trial, chosen, compare, together, widened

SKILLS = ("middle", "unrotate", "ends", "star")
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj"]
EXPERT = {"method": "lora", "rank": 8, "alpha": 8}
EXPERT_STEPS, EXPERT_RATE = 60, 5e-3
LINES, STEPS, ROWS, WORDS = (64, 256, 1024), 200, 16, 60
#: The number of lines at which every contender's rate is chosen.
TUNED = 256
RATES = (5e-3, 2e-2, 8e-2)
BALANCE, ENTROPY = 0.1, 0.1
RSL, PRINTED, BALANCED, NONE = "RSL, specialising", "RSL, sign as printed", "balance loss alone", "no loss"
LOSSES: dict[str, dict[str, Any]] = {
    RSL: {"load_balance": BALANCE, "entropy": ENTROPY},
    PRINTED: {"load_balance": BALANCE, "entropy": ENTROPY, "entropy_sign": "paper_formula"},
    BALANCED: {"load_balance": BALANCE, "entropy": 0.0},
    NONE: {"load_balance": 0.0, "entropy": 0.0},
}
ORACLE, AVERAGE, SUM = "right LoRA alone (oracle)", "average of the LoRAs", "sum of the LoRAs"
SETUP = (
    "Four LoRAs of rank 8 on the attention of the pocket model, each trained alone on one held-out skill (middle, "
    "unrotate, ends, star), then frozen; routers over them trained on 64, 256 or 1,024 mixed lines for 200 steps of "
    "16, all experts in training and the best three later. Loss weights 0.1 for balance and 0.1 for entropy, set "
    "beforehand; the rate of each contender is chosen at 256 lines from three. Judged by exact match on 60 test words "
    "of each skill. "
)


@dataclass(frozen=True)
class Bench:
    """The pocket model with the trained LoRAs of one seed, named by their skills."""

    model: Any
    tokenizer: Any
    seed: int


def _batch(bench: Bench, lines: Sequence[pocket.Example]) -> tuple[dict[str, Tensor], Tensor]:
    """A padded batch, and where it has real tokens."""
    batch = pocket.batch(bench.tokenizer, lines)
    return batch, batch["attention_mask"].bool()


def right(bench: Bench, lines: Sequence[pocket.Example]) -> float:
    """Exact match by one pass: greedy decoding gives the answer where every token of it is the most probable."""
    batch, _ = _batch(bench, lines)
    labels = batch.pop("labels")[:, 1:]
    with torch.no_grad():
        best = bench.model(**batch, use_cache=False).logits[:, :-1].argmax(-1)
    return float(((best == labels) | (labels < 0)).all(1).float().mean())


def scores(bench: Bench, count: int, names: Mapping[str, Any] | None = None) -> dict[str, float]:
    """Mean exact match over the skills on validation and test words, with what is active or ``names[skill]`` is."""
    found: dict[str, list[float]] = {"validation": [], "test": []}
    for skill in SKILLS:
        if names is not None:
            lorry.activate(bench.model, names[skill])
        lines = pocket.examples(skill, "test", 2 * count, seed=1)
        found["validation"].append(right(bench, lines[count:]))
        found["test"].append(right(bench, lines[:count]))
    return {name: statistics.fmean(values) for name, values in found.items()}


def fixed(bench: Bench, count: int) -> dict[str, float]:
    """Test accuracy without a router."""
    share = 1 / len(SKILLS)
    ways: dict[str, Mapping[str, Any]] = {
        ORACLE: {skill: skill for skill in SKILLS},
        AVERAGE: dict.fromkeys(SKILLS, dict.fromkeys(SKILLS, share)),
        SUM: dict.fromkeys(SKILLS, dict.fromkeys(SKILLS, 1.0)),
    }
    found = {way: scores(bench, count, names)["test"] for way, names in ways.items()}
    lorry.activate(bench.model, None)
    return found


def train_router(bench: Bench, mixture: Adapter, lines: int, steps: int, rate: float) -> None:
    """Train a mixture's router on mixed lines, the skills in equal shares."""
    model, g = bench.model, torch.Generator().manual_seed(bench.seed)
    mixed = [line for s in SKILLS for line in pocket.examples(s, "train", lines // len(SKILLS), 100 + bench.seed)]

    def loss(step: int) -> Tensor:
        picked = torch.randint(len(mixed), (ROWS,), generator=g).tolist()
        batch, real = _batch(bench, [mixed[i] for i in picked])
        with lorry.context(model, padding_mask=real):
            value: Tensor = model(**batch, use_cache=False).loss
            more = lorry.auxiliary_loss(model, mixture.name)
        return value if more is None else value + more

    model.train()
    train(mixture.parameters(), loss, steps, rate)
    model.eval()


def routes(bench: Bench, mixture: Adapter, count: int) -> dict[str, float]:
    """What the routers do with test lines, means over routers and real tokens.

    Returns
    -------
    dict
        ``information`` of the task and the best expert and ``entropy`` of the probabilities, in bits, and
        ``mass``, the probability that the kept experts have.
    """
    batch, real = _batch(bench, [line for s in SKILLS for line in pocket.examples(s, "test", 2 * count, 1)[:count]])
    batch.pop("labels")
    inputs: dict[str, Tensor] = {}
    sites = {input_router(entry.site): path for path, entry in mixture.entries.items()}

    def keep(name: str) -> Any:
        def hook(module: Any, given: tuple[Tensor, ...]) -> None:
            inputs[name] = given[0].detach()

        return hook

    hooks = [bench.model.get_submodule(p).register_forward_pre_hook(keep(name)) for name, p in sites.items()]
    with torch.no_grad():
        bench.model(**batch, use_cache=False)
    for hook in hooks:
        hook.remove()
    tasks = torch.arange(len(SKILLS)).repeat_interleave(count)[:, None].expand_as(real)[real]
    found: dict[str, list[float]] = {"information": [], "entropy": [], "mass": []}
    for name, path in sites.items():
        entry = mixture.entries[path]
        p = (inputs[name][real] @ entry.tensors()[name].detach().mT).softmax(-1)
        found["information"].append(information(tasks, p.argmax(-1), len(SKILLS)))
        found["entropy"].append(float(torch.special.entr(p).sum(-1).mean()) / torch.log(torch.tensor(2.0)).item())
        found["mass"].append(float(p.topk(entry.method.top_k).values.sum(-1).mean()))  # type: ignore[attr-defined]
    return {name: statistics.fmean(values) for name, values in found.items()}


def information(a: Tensor, b: Tensor, kinds: int) -> float:
    """Mutual information in bits of two lists of numbers below `kinds`."""
    joint = torch.bincount(a * kinds + b, minlength=kinds**2).double().reshape(kinds, kinds) / len(a)
    parts = [torch.special.entr(p).sum() for p in (joint.sum(0), joint.sum(1), joint)]
    return float((parts[0] + parts[1] - parts[2]) / torch.log(torch.tensor(2.0)))


def routed(
    bench: Bench, losses: Mapping[str, Any], lines: int, steps: int, rate: float, count: int
) -> dict[str, float]:
    """Train a router over the LoRAs and measure it; the LoRAs stay as they are."""
    mixture = from_adapters(bench.model, {"method": "lora-mixer", **losses}, SKILLS, seed=bench.seed)
    try:
        train_router(bench, mixture, lines, steps, rate)
        found = {**scores(bench, count), **routes(bench, mixture, count), "values": float(mixture.count())}
        mixture.configure(inference_mode="soft")
        return {**found, "all experts": scores(bench, count)["test"]}
    finally:
        mixture.detach()


@cache
def trials(setting: Setting) -> tuple[dict[int, Trial], dict[str, list[float]]]:
    """All routers by number of lines, at the rates chosen at one of them; and what needs no router, by seed."""
    steps, count = setting.much(STEPS, 2), setting.much(WORDS, 4)
    with ExitStack() as stack:
        benches = []
        for seed in setting.seeds:
            jobs = [
                words.job(
                    s, EXPERT, s, setting.much(EXPERT_STEPS, 2), EXPERT_RATE, 10 * seed + i, ROWS, targets=TARGETS
                )
                for i, s in enumerate(SKILLS)
            ]
            model, tokenizer, _ = stack.enter_context(words.trained(jobs))
            benches.append(Bench(model, tokenizer, seed))
        without = [fixed(bench, count) for bench in benches]

        def runs(name: str, lines: int, rate: float) -> list[dict[str, float]]:
            return [routed(bench, LOSSES[name], lines, steps, rate, count) for bench in benches]

        tuned = chosen({name: widened(functools.partial(runs, name, TUNED), RATES) for name in LOSSES})
        found = {TUNED: tuned}
        for lines in LINES:
            if lines != TUNED:
                found[lines] = chosen({n: {tuned.rates[n]: runs(n, lines, tuned.rates[n])} for n in LOSSES})
    return found, {way: [one[way] for one in without] for way in without[0]}


def _series(found: Mapping[int, Trial], metric: str) -> dict[str, list[list[float]]]:
    return {name: [list(found[n].metrics[name][metric]) for n in LINES] for name in LOSSES}


def _by_lines(found: Mapping[int, Trial], name: str, metric: str = "test") -> str:
    return ", ".join(f"{found[n].mean(name, metric):.2f}" for n in LINES)


@claim(
    "lora-mixer",
    "routed",
    says="A router over frozen LoRAs that exist, trained on 2,000 mixed samples, is better than using them one by one "
    "(Flan-T5 with five public LoRAs: CoLA 80.54 to 82.14, MRPC 83.76 to 85.15, RTE 83.47 to 85.31 over the single "
    "LoRA).",
    source="arXiv 2507.00029, results with public LoRAs, as reviews quote them",
    trial=SETUP + "The default contender is RSL with the sign that specialises. Against the claim: at any number of "
    "lines it does not beat the average of the LoRAs, or stays below the right LoRA of each line, which an oracle "
    "chooses.",
)
def routed_against_fixed(setting: Setting) -> Finding:
    """Routed against averaged, added and chosen by an oracle."""
    found, without = trials(setting)
    own = {n: found[n].metrics[RSL]["test"] for n in LINES}
    over = {
        way: [a - b for n in LINES for a, b in zip(own[n], without[way], strict=True)] for way in (AVERAGE, ORACLE, SUM)
    }
    verdict = together([compare(over[AVERAGE]), compare(over[ORACLE])])
    summary = (
        f"With 64, 256 and 1,024 lines the router reaches {_by_lines(found, RSL)}; the average of the LoRAs "
        f"{statistics.fmean(without[AVERAGE]):.2f}, their sum {statistics.fmean(without[SUM]):.2f}, the right LoRA "
        f"alone {statistics.fmean(without[ORACLE]):.2f}."
    )
    lines = {way: [values] * len(LINES) for way, values in without.items()}
    series = {RSL: _series(found, "test")[RSL], NONE: _series(found, "test")[NONE], **lines}
    panel = Panel("Mixed test words", "exact match", series, LINES, "lines for the router", log_x=True)
    notes = [
        f"The routers have {found[TUNED].mean(RSL, 'values'):,.0f} values.",
        f"Of the probability the best three of four experts keep {_by_lines(found, RSL, 'mass')}; with all experts "
        f"instead the router reaches {_by_lines(found, RSL, 'all experts')}.",
    ]
    return Finding(verdict, summary, [panel], found[TUNED].rates, [*notes, *found[TUNED].notes])


@claim(
    "lora-mixer",
    "specialise",
    says="The specialising loss needs fewer samples than a balance loss: with 2,000 samples and the same experts "
    "HumanEval is 57.32 with it and 50.46 with the next loss; it helps most with 1,000 to 2,000 samples and ties from "
    "6,000 on.",
    source="arXiv 2507.00029, comparison of routing losses by amount of data, as reviews quote it",
    trial=SETUP + "RSL with the sign that specialises against the balance loss alone; no loss and the printed sign "
    "stand beside them. Against the claim: no lead at 64 lines, or no greater one than at 256 and at 1,024; or no more "
    "mutual information of task and best expert.",
)
def specialise(setting: Setting) -> Finding:
    """The lead over the balance loss by the number of lines, and what the routers know of the task."""
    found, _ = trials(setting)
    leads = {n: found[n].gain(RSL, BALANCED) for n in LINES}
    later = [max(pair) for pair in zip(leads[LINES[1]], leads[LINES[2]], strict=True)]
    knows = [
        statistics.fmean(row) for row in zip(*(found[n].gain(RSL, BALANCED, "information") for n in LINES), strict=True)
    ]
    # without a lead there is none that could be greater
    fewer = [min(a, a - b) for a, b in zip(leads[LINES[0]], later, strict=True)]
    verdict = together([compare(leads[LINES[0]]), compare(fewer), compare(knows)])
    lead = ", ".join(f"{statistics.fmean(leads[n]):+.3f}" for n in LINES)
    summary = (
        f"With 64, 256 and 1,024 lines RSL is ahead of the balance loss by {lead}. Task and best expert share "
        f"{_by_lines(found, RSL, 'information')} bits of 2 with RSL, {_by_lines(found, BALANCED, 'information')} with "
        f"the balance loss, {_by_lines(found, NONE, 'information')} without a loss, "
        f"{_by_lines(found, PRINTED, 'information')} with the printed sign."
    )
    over_lines = functools.partial(Panel, x=LINES, x_name="lines for the router", log_x=True)
    panels = [
        over_lines("Mixed test words", "exact match", _series(found, "test")),
        over_lines("Task and best expert", "mutual information, bits", _series(found, "information")),
        over_lines("Routing of a token", "entropy, bits", _series(found, "entropy")),
    ]
    notes = ["The runs are those of lora-mixer/routed.", *found[TUNED].notes]
    return Finding(verdict, summary, panels, found[TUNED].rates, notes)
