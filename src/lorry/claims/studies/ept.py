"""EPT: experts of several granularities against experts of one, and what they cost."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Generator, Tensor, nn

import lorry
from lorry.claims.ledger import Finding, Panel, Setting, claim
from lorry.claims.synthetic import HELD, Teacher, fit, rows_of, scores
from lorry.claims.verdicts import Trial, compare, together, tune

WIDTH, RANK, STEPS = 48, 4, 300
SIZES = (2, 4, 6, 8)
RATES = (5e-3, 2e-2, 8e-2, 3e-1)
PYRAMID = (2, 2, 4, 4, 6, 6, 8, 8)
KERNELS = {"pyramid": PYRAMID, **{f"all {size}": (size,) * len(PYRAMID) for size in SIZES}}
#: Contenders on the teacher that favours no size.
FEW = ("pyramid", "all 2", "all 8")
#: Layers of the count, by their inputs and outputs.
LAYERS = ((768, 768), (2048, 2048), (4096, 4096))


def ept(kernels: tuple[int, ...]) -> dict[str, Any]:
    """An EPT without the published factor of tasks and with a gate that is not sharpened."""
    return {
        "method": "ept",
        "rank": RANK,
        "kernels": kernels,
        "temperature": 1.0,
        "freq_scale": "none",
        "contrastive": 0.0,
        "init_std": 0.3,
    }


def teacher(seed: int, structured: bool) -> Teacher:
    """Four groups of inputs with an update each, all of one norm.

    Parameters
    ----------
    seed
        Of everything.
    structured
        Kronecker products with kernels of size 2, 4, 6 and 8 that share a seed of rank 4, or else
        matrices of rank 8 between random subspaces.
    """
    g = Generator().manual_seed(seed)
    a, b = torch.randn(RANK, WIDTH // 2, generator=g), torch.randn(WIDTH // 2, RANK, generator=g)
    found = []
    for size in SIZES:
        if structured:
            parts = WIDTH // size
            update = torch.kron(b[:parts] @ a[:, :parts], torch.randn(size, size, generator=g))
        else:
            update = torch.randn(WIDTH, 2 * RANK, generator=g) @ torch.randn(2 * RANK, WIDTH, generator=g)
        found.append(update * (WIDTH**0.5 / update.norm()))
    updates = torch.stack(found)

    def apply(x: Tensor, groups: Tensor) -> Tensor:
        return (x @ updates.mT)[groups, torch.arange(len(x))]

    centres = 4 * rows_of(len(SIZES), WIDTH, generator=g)
    return Teacher(torch.randn(WIDTH, WIDTH, generator=g) / WIDTH**0.5, centres, apply)


def learn(
    kernels: tuple[int, ...], made: Callable[[int], Teacher], steps: int, rate: float, seed: int
) -> dict[str, float]:
    """Train one contender; ``used`` counts the experts that get a hundredth of the tokens or more."""
    what = made(seed)
    model, adapter = fit(ept(kernels), what, steps, rate, seed)
    with torch.no_grad(), lorry.context(model, recording=True) as context:
        model(what.draw(HELD, Generator().manual_seed(30_000 + seed))[0])
    (load,) = [value for (_, _, name), value in context.records.items() if name == "load"]
    return {**scores(model, what, seed), "values": float(adapter.count()), "used": float((load >= 0.01).sum())}


def contest(setting: Setting, structured: bool) -> Trial:
    """Tune the pyramid and the uniform experts on the teachers of all seeds."""
    made = functools.partial(teacher, structured=structured)
    steps = setting.much(STEPS, 2)
    names = KERNELS if structured else FEW
    runs = {name: functools.partial(learn, KERNELS[name], made, steps) for name in names}
    return tune(runs, RATES, setting.seeds)


def leads(trial: Trial) -> list[float]:
    """By how much the error of the best uniform contender exceeds the pyramid's, by seed."""
    uniform = [trial.gain(name, "pyramid") for name in trial.metrics if name != "pyramid"]
    return [min(gains) for gains in zip(*uniform, strict=True)]


def best_uniform(trial: Trial) -> str:
    """The uniform contender with the least mean error."""
    return min((name for name in trial.metrics if name != "pyramid"), key=trial.mean)


@claim(
    "ept",
    "pyramid",
    says="Experts of several kernel sizes beat experts of one (GLUE, T5-base: pyramid 87.0; all 2 86.5, all 4 86.2, "
    "all 6 85.9, all 8 86.3).",
    source="arXiv 2603.12577, ablation of kernel sizes",
    trial="One frozen layer of width 48, four groups of inputs and a teacher with an update for each: Kronecker "
    "products with kernels of size 2, 4, 6 and 8 on one seed of rank 4, which favours the method. Eight experts, two "
    "active, temperature 1, no factor of tasks: pyramid against all of one size; 300 steps of 128 fresh rows. Beside "
    "it pyramid, all 2 and all 8 with random updates of rank 8, which favour no size. Against the claim: experts of "
    "one size leave no more error than the pyramid on the first teacher, or less by 0.01 on the second.",
)
def pyramid(setting: Setting) -> Finding:
    """Kernel sizes 2 to 8 against one of them, on a teacher of that form and on one without form."""
    kronecker, plain = contest(setting, True), contest(setting, False)
    # on the teacher without form a tie is enough
    verdict = together([compare(leads(kronecker)), compare(leads(plain), margin=-0.01)])
    summary = (
        f"On the Kronecker teacher the pyramid leaves {kronecker.mean('pyramid'):.3f} of the bare layer's error and "
        f"the best uniform experts ({best_uniform(kronecker)}) {kronecker.mean(best_uniform(kronecker)):.3f}; on "
        f"random updates {plain.mean('pyramid'):.3f} and {plain.mean(best_uniform(plain)):.3f} ({best_uniform(plain)})."
    )
    unit = "squared error, share of the bare layer's"
    panels = [
        Panel("Kronecker teacher, error on fresh rows", unit, kronecker.of()),
        Panel("Teacher without form, error on fresh rows", unit, plain.of()),
    ]
    sizes = ", ".join(f"{name} {kronecker.mean(name, 'values'):.0f}" for name in KERNELS)
    used = ", ".join(f"{name} {kronecker.mean(name, 'used'):.1f}" for name in KERNELS)
    notes = [
        f"Trained values: {sizes}.",
        f"Experts of 8 with a hundredth of the tokens or more, on the Kronecker teacher: {used}.",
        *(f"Kronecker teacher: {note}" for note in kronecker.notes),
        *(f"Teacher without form: {note}" for note in plain.notes),
    ]
    return Finding(verdict, summary, panels, kronecker.rates, notes)


def count(method: dict[str, Any], layer: tuple[int, int]) -> tuple[int, int]:
    """Values of an adapter at one layer: all, and those of the router."""
    model = nn.Sequential(nn.Linear(*layer, bias=False, device="meta"))
    with torch.device("meta"):
        adapter = lorry.attach(model, method)
    sizes = {name: value.numel() for name, value in adapter.named_parameters()}
    return sum(sizes.values()), sum(size for name, size in sizes.items() if name.endswith("router"))


@claim(
    "ept",
    "values",
    says="Experts cost almost nothing: 6,384 values for a layer of 768 x 768 where eight LoRAs of rank 8 have 98,304, "
    "a fifteenth.",
    source="arXiv 2603.12577, parameter efficiency",
    trial="Trained values of EPT of rank 8 with kernels 2, 2, 4, 4, 6, 6, 8, 8 and of a mixture of eight LoRAs of rank "
    "8, counted at layers of three widths, with and without the routers, which both need. Against the claim: a factor "
    "below 10, of the experts or of all that is trained.",
)
def values(setting: Setting) -> Finding:
    """Counts with and without routers."""
    pyramid = {"method": "ept", "rank": 8, "kernels": PYRAMID, "contrastive": 0.0}
    loras = {"method": "lora-mixer", "rank": 8, "experts": len(PYRAMID), "load_balance": 0.0, "entropy": 0.0}
    counts = {name: [count(m, layer) for layer in LAYERS] for name, m in {"EPT": pyramid, "LoRAs": loras}.items()}
    bare = [(b - s) / (a - r) for (a, r), (b, s) in zip(counts["EPT"], counts["LoRAs"], strict=True)]
    whole = [b / a for (a, _), (b, _) in zip(counts["EPT"], counts["LoRAs"], strict=True)]
    share = [r / a for a, r in counts["EPT"]]
    experts = counts["EPT"][0][0] - counts["EPT"][0][1]
    summary = (
        f"At 768 x 768 the experts have {experts:,} values, {bare[0]:.1f} times fewer than the LoRAs; the router has "
        f"{counts['EPT'][0][1]:,} more, {share[0]:.0%} of all, so that with routers the factor is {whole[0]:.1f}."
    )
    series = {"experts alone": [[f] for f in bare], "with routers": [[f] for f in whole]}
    shares = {"EPT": [[s] for s in share], "mixture of LoRAs": [[r / a] for a, r in counts["LoRAs"]]}
    widths = [inner for inner, _ in LAYERS]
    panels = [
        Panel("LoRA mixture's values as a multiple of EPT's", "factor", series, widths, "width", log_x=True),
        Panel("Share of the router", "share of trained values", shares, widths, "width", log_x=True),
    ]
    verdict = together([compare([f - 10 for f in bare]), compare([f - 10 for f in whole])])
    return Finding(verdict, summary, panels, notes=["Counted, not trained: seeds and effort change nothing."])
