"""EPT: experts of several granularities against experts of one, and what they cost."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Generator, Tensor, nn

import lorry
from lorry.claims.fitting import train
from lorry.claims.ledger import Finding, Panel, Setting, claim
from lorry.claims.synthetic import HELD, ROWS, Teacher, rows_of
from lorry.claims.verdicts import Trial, compare, together, tune
from lorry.core.life.adapter import Adapter
from lorry.methods.parts.tasks import nearest_tasks

WIDTH, RANK, STEPS = 48, 4, 300
SIZES = (2, 4, 6, 8)
RATES = (5e-3, 2e-2, 8e-2, 3e-1)
PYRAMID = (2, 2, 4, 4, 6, 6, 8, 8)
KERNELS = {"pyramid": PYRAMID, **{f"all {size}": (size,) * len(PYRAMID) for size in SIZES}}
#: Contenders on the teacher that favours no size.
FEW = ("pyramid", "all 2", "all 8")
#: Layers of the count, by their inputs and outputs, and how many of one size a model has.
LAYERS, DEPTH = ((768, 768), (2048, 2048), (4096, 4096)), 12
#: Weight of the contrastive loss.
CONTRASTIVE = 0.1


def ept(kernels: tuple[int, ...], gate: str = "token+task") -> dict[str, Any]:
    """An EPT without the published factor of tasks and with a softmax that is not sharpened; a gate that reads the
    token alone comes without task embeddings.
    """
    return {
        "method": "ept",
        "rank": RANK,
        "kernels": kernels,
        "tasks": len(SIZES),
        "gate": gate,
        "temperature": 1.0,
        "freq_scale": "none",
        "contrastive": 0.0 if gate == "token" else CONTRASTIVE,
        "init_std": 0.3,
    }


BARE = "pyramid, no embeddings"
#: Contenders on the Kronecker teacher.
CONTENDERS = {
    **{name: ept(kernels) for name, kernels in KERNELS.items()},
    "pyramid, task alone": ept(PYRAMID, "task"),
    BARE: ept(PYRAMID, "token"),
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


def tasks_of(adapter: Adapter, x: Tensor) -> Tensor | None:
    """The task of each row as the embeddings guess it, since rows come without a label; None without embeddings."""
    embeddings = adapter.entries["0"].tensors().get("tasks")
    return None if embeddings is None else nearest_tasks(x, embeddings.detach())


def learn(
    method: Mapping[str, Any], made: Callable[[int], Teacher], steps: int, rate: float, seed: int
) -> dict[str, float]:
    """Train one contender.

    Returns
    -------
    dict
        Errors on ``validation`` (sign changed) and ``test`` rows; ``used``, how many experts get a hundredth of the
        tokens or more; ``told``, the share of rows whose task the embeddings find.
    """
    what = made(seed)
    model = what.model()
    adapter, generator = lorry.attach(model, method, seed=seed), Generator().manual_seed(seed)

    def loss(step: int) -> Tensor:
        x, groups, y = what.draw(ROWS, generator)
        with lorry.context(model, task_ids=groups):
            value = nn.functional.mse_loss(model(x), y)
            more = lorry.auxiliary_loss(model, adapter.name)
        return value if more is None else value + more

    model.train()
    train(adapter.parameters(), loss, steps, rate)
    model.eval()
    found = {"values": float(adapter.count())}
    for part, first in (("validation", 10_000), ("test", 20_000)):
        x, groups, y = what.draw(HELD, Generator().manual_seed(first + seed))
        guessed = tasks_of(adapter, x)
        with torch.no_grad(), lorry.context(model, task_ids=guessed, recording=True) as context:
            left = (model(x) - y).square().sum() / (x @ what.weight.T - y).square().sum()
        found[part] = float(left) if part == "test" else -float(left)
        (load,) = [value for (_, _, name), value in context.records.items() if name == "load"]
        found["used"] = float((load >= 0.01).sum())
        found["told"] = 0.0 if guessed is None else float((guessed == groups).float().mean())
    return found


def contest(setting: Setting, structured: bool) -> Trial:
    """Tune the pyramid and the uniform experts on the teachers of all seeds."""
    made = functools.partial(teacher, structured=structured)
    steps = setting.much(STEPS, 2)
    names = CONTENDERS if structured else FEW
    runs = {name: functools.partial(learn, CONTENDERS[name], made, steps) for name in names}
    return tune(runs, RATES, setting.seeds)


def uniform_of(trial: Trial) -> list[str]:
    """The contenders whose experts have one size."""
    return [name for name in trial.metrics if name.startswith("all ")]


def leads(trial: Trial) -> list[float]:
    """By how much the error of the best uniform contender exceeds the pyramid's, by seed."""
    uniform = [trial.gain(name, "pyramid") for name in uniform_of(trial)]
    return [min(gains) for gains in zip(*uniform, strict=True)]


def best_uniform(trial: Trial) -> str:
    """The uniform contender with the least mean error."""
    return min(uniform_of(trial), key=trial.mean)


@claim(
    "ept",
    "pyramid",
    says="Experts of several kernel sizes beat experts of one (GLUE, T5-base: pyramid 87.0; all 2 86.5, all 4 86.2, "
    "all 6 85.9, all 8 86.3).",
    source="arXiv 2603.12577, ablation of kernel sizes",
    trial="One frozen layer of width 48, four groups of inputs and a teacher with an update for each: Kronecker "
    "products with kernels of size 2, 4, 6 and 8 on one seed of rank 4, which favours the method. Eight experts, two "
    "active, temperature 1, no factor of tasks: pyramid against all of one size; 300 steps of 128 fresh rows. Each "
    "group is a task, whose embedding is trained by the contrastive loss (weight 0.1) and read by the gate beside the "
    "input; test rows come without their task and go by the nearest embedding. A gate that reads the task alone, and "
    "one without embeddings, stand beside them. So do pyramid, all 2 and all 8 with random updates of rank 8, which "
    "favour no size. Against the claim: experts of one size leave no more error than the pyramid on the first teacher, "
    "or less by 0.01 on the second.",
)
def pyramid(setting: Setting) -> Finding:
    """Kernel sizes 2 to 8 against one of them, on a teacher of that form and on one without form."""
    kronecker, plain = contest(setting, True), contest(setting, False)
    # on the teacher without form a tie is enough
    verdict = together([compare(leads(kronecker)), compare(leads(plain), margin=-0.01)])
    summary = (
        f"On the Kronecker teacher the pyramid leaves {kronecker.mean('pyramid'):.3f} of the bare layer's error and "
        f"the best uniform experts ({best_uniform(kronecker)}) {kronecker.mean(best_uniform(kronecker)):.3f}; "
        f"on random updates {plain.mean('pyramid'):.3f} and {plain.mean(best_uniform(plain)):.3f} "
        f"({best_uniform(plain)}). Without task embeddings the pyramid leaves {kronecker.mean(BARE):.3f} on the first."
    )
    unit = "squared error, share of the bare layer's"
    panels = [
        Panel("Kronecker teacher, error on fresh rows", unit, kronecker.of()),
        Panel("Teacher without form, error on fresh rows", unit, plain.of()),
    ]
    sizes = ", ".join(f"{name} {kronecker.mean(name, 'values'):.0f}" for name in CONTENDERS)
    used = ", ".join(f"{name} {kronecker.mean(name, 'used'):.1f}" for name in CONTENDERS)
    told = ", ".join(f"{name} {kronecker.mean(name, 'told'):.1%}" for name in CONTENDERS if name != BARE)
    notes = [
        f"Test rows of the Kronecker teacher whose task the embeddings find: {told}.",
        f"Trained values: {sizes}.",
        f"Experts of 8 with a hundredth of the tokens or more, on the Kronecker teacher: {used}.",
        *(f"Kronecker teacher: {note}" for note in kronecker.notes),
        *(f"Teacher without form: {note}" for note in plain.notes),
    ]
    return Finding(verdict, summary, panels, kronecker.rates, notes)


def count(method: dict[str, Any], layer: tuple[int, int]) -> dict[str, float]:
    """Values of an adapter for each of `DEPTH` equal layers: ``all``, the ``router``'s, and its share of the ``tasks``.

    Task embeddings belong to the whole model.
    """
    model = nn.Sequential(*(nn.Linear(*layer, bias=False, device="meta") for _ in range(DEPTH)))
    with torch.device("meta"):
        adapter = lorry.attach(model, method)
    sizes = {name: value.numel() for name, value in adapter.named_parameters()}
    found = {part: sum(n for name, n in sizes.items() if name.endswith(part)) for part in ("router", "tasks")}
    return {part: n / DEPTH for part, n in {"all": sum(sizes.values()), **found}.items()}


@claim(
    "ept",
    "values",
    says="Experts cost almost nothing: 6,384 values for a layer of 768 x 768 where eight LoRAs of rank 8 have 98,304, "
    "a fifteenth.",
    source="arXiv 2603.12577, parameter efficiency",
    trial=f"Trained values of EPT of rank 8 with kernels 2, 2, 4, 4, 6, 6, 8, 8 and embeddings of eight tasks, and of "
    f"a mixture of eight LoRAs of rank 8, counted on models of {DEPTH} layers of three widths: experts alone, with the "
    "routers, which both need, and with the embeddings. Against the claim: a factor below 10, of the experts or of all "
    "that is trained.",
)
def values(setting: Setting) -> Finding:
    """Counts of experts, routers and task embeddings."""
    pyramid = {"method": "ept", "rank": 8, "kernels": PYRAMID}
    loras = {"method": "lora-mixer", "rank": 8, "experts": len(PYRAMID), "load_balance": 0.0, "entropy": 0.0}
    own, others = ([count(method, layer) for layer in LAYERS] for method in (pyramid, loras))
    pairs = list(zip(own, others, strict=True))
    bare = [(b["all"] - b["router"]) / (a["all"] - a["router"] - a["tasks"]) for a, b in pairs]
    routed = [b["all"] / (a["all"] - a["tasks"]) for a, b in pairs]
    whole = [b["all"] / a["all"] for a, b in pairs]
    first = own[0]
    summary = (
        f"At 768 x 768 the experts have {first['all'] - first['router'] - first['tasks']:,.0f} values, {bare[0]:.1f} "
        f"times fewer than the LoRAs; the router has {first['router']:,.0f} and the layer's share of the embeddings is "
        f"{first['tasks']:,.0f}, so that with routers the factor is {routed[0]:.1f} and with all that is trained "
        f"{whole[0]:.1f}."
    )
    factors = {"experts alone": bare, "with routers": routed, "with routers and task embeddings": whole}
    shares = {
        "EPT, router": [a["router"] / a["all"] for a in own],
        "EPT, task embeddings": [a["tasks"] / a["all"] for a in own],
        "mixture of LoRAs, router": [b["router"] / b["all"] for b in others],
    }
    widths = [inner for inner, _ in LAYERS]
    panels = [
        Panel(title, unit, {n: [[v] for v in found] for n, found in series.items()}, widths, "width", log_x=True)
        for title, unit, series in (
            ("LoRA mixture's values as a multiple of EPT's", "factor", factors),
            ("Shares of routers and embeddings", "share of trained values", shares),
        )
    ]
    verdict = together([compare([f - 10 for f in bare]), compare([f - 10 for f in whole])])
    return Finding(verdict, summary, panels, notes=["Counted, not trained: seeds and effort change nothing."])
