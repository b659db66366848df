"""What "Computational Limits of LoRA" says of gradients by factors: where they are right, what they cost."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from lorry.attention import Approximation, AttentionError, exact_gradients, factor_gradients, fast_gradients
from lorry.attention.factored import Gradients
from lorry.bench.limits import run, slope

from ..ledger import Finding, Panel, Setting, claim
from ..verdicts import compare, together

PAPER = "arXiv 2406.03136 (ICLR 2025)"
GAMMAS = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0)
DEGREES = (1, 2, 4, 8)
WIDTH, RANK, TOKENS = 4, 2, 64


def drawn(seed: int, *shape: int, most: float | None = None) -> Tensor:
    """Return normal numbers in float64, scaled so that the largest entry is `most`."""
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return values if most is None else values * (most / values.abs().max())


def error(gamma: float, degree: int, seed: int) -> float:
    """Return the relative error of the gradients of A and B of the queries at norms `gamma`."""
    x, width = drawn(seed, TOKENS, 8), 8
    a, b = drawn(seed + 1, RANK, width), drawn(seed + 2, WIDTH, RANK)
    w = drawn(seed + 3, WIDTH, width)
    scale = 1 / RANK
    total = w + scale * b @ a
    by = gamma / (x @ total.T).abs().max()
    q, k = by * x @ total.T, drawn(seed + 4, TOKENS, WIDTH, most=gamma)
    v, upstream = drawn(seed + 5, TOKENS, WIDTH), drawn(seed + 6, TOKENS, WIDTH)
    exact = exact_gradients(q, k, v, upstream, scaling=1.0)
    # the paper's chain as it stands, without what else makes logits smaller
    ours = fast_gradients(
        q, k, v, upstream, scaling=1.0, how=Approximation(degree=degree, center_keys=False, balance=False)
    )
    pairs = [factor_gradients(by * x, a, b, scale, g.q) for g in (ours, exact)]
    found, true = (torch.cat([g.flatten() for g in pair]) for pair in pairs)
    return float((found - true).norm() / true.norm())


@claim(
    "computational-limits",
    "phase-transition",
    says="Whether a gradient by low-rank factors is right is decided by the norms of queries and keys.",
    source=f"{PAPER}, Theorems 3.1 and 4.1",
    trial=f"One head of width {WIDTH} with a LoRA of rank {RANK} on the queries over {TOKENS} tokens, in float64, with "
    "queries and keys scaled so that their largest entries are Γ; the gradients of A and B by Taylor's polynomial, "
    "neither centred nor balanced, against the closed form. Against: the error at degree 4 does not rise with each Γ, "
    "or by fewer than six decades from Γ = 0.25 to 2.",
)
def phase_transition(setting: Setting) -> Finding:
    """Errors by norm and degree."""
    found = {g: [[_or_whole(gamma, g, seed) for seed in setting.seeds] for gamma in GAMMAS] for g in DEGREES}
    four = found[4]
    rises = [min(b[i] / a[i] for a, b in zip(four, four[1:], strict=False)) - 1 for i in range(len(setting.seeds))]
    decades = [math.log10(four[-1][i] / four[0][i]) for i in range(len(setting.seeds))]
    means = {g: [statistics.fmean(at) for at in rows] for g, rows in found.items()}
    return Finding(
        together([compare(rises), compare([d - 6 for d in decades])]),
        f"At degree 4 the relative error is {means[4][0]:.0e} at Γ = 0.25, {means[4][3]:.0e} at 1 and "
        f"{means[4][-1]:.0e} at 2: {min(decades):.1f} decades at least. At Γ = 2 degree 8 has {means[8][-1]:.0e}.",
        [
            Panel(
                "Gradients of A and B",
                "relative error",
                {f"degree {g}": rows for g, rows in found.items()},
                GAMMAS,
                "largest entry Γ of queries and keys",
                log_y=True,
            )
        ],
        notes=[
            f"√ln L is {math.sqrt(math.log(TOKENS)):.2f} at {TOKENS} tokens: so short, the width of the head decides."
        ],
    )


def _or_whole(gamma: float, degree: int, seed: int) -> float:
    """Return the error, or 1 where the polynomial is negative and nothing comes out."""
    try:
        return error(gamma, degree, 100 * seed)
    except AttentionError:
        return 1.0


LENGTHS = (512, 1024, 2048, 4096, 8192)


@claim(
    "computational-limits",
    "scaling",
    says="Below the bound, gradients take time and memory almost linear in the length.",
    source=f"{PAPER}, Theorem 3.1",
    trial=f"`lorry bench limits`: forward and backward of one head of width {WIDTH} at degree 4 and Γ = 0.25, "
    f"{LENGTHS[0]} to {LENGTHS[-1]} tokens in float32, three rounds for each seed. Against: the slope of log time over "
    "log length is above 1.3, or that of memory is; or torch's exact product is not steeper than the factors by 0.3.",
)
def scaling(setting: Setting) -> Finding:
    """Slopes of time and memory, and the ratio to torch's product by length."""
    lengths = LENGTHS[: setting.much(len(LENGTHS), 2)]
    runs = [
        run(",".join(map(str, lengths)), WIDTH, degree=4, gamma=0.25, rounds=setting.much(3)) for _ in setting.seeds
    ]
    time = {side: [one["slopes"]["seconds"][side] for one in runs] for side in ("factors", "torch")}
    memory = [one["slopes"]["bytes"]["factors"] for one in runs]
    steeper = [b - a - 0.3 for a, b in zip(time["factors"], time["torch"], strict=True)]
    ratios = [[one["lengths"][str(n)]["ratio to torch"]["ratio"] for one in runs] for n in lengths]
    worst = max(one["lengths"][str(n)]["relative error"] for one in runs for n in lengths)
    matrix = slope(lengths[:3], [runs[0]["lengths"][str(n)]["bytes"]["matrix"] for n in lengths[:3]])
    return Finding(
        together([compare([1.3 - s for s in time["factors"]]), compare([1.3 - s for s in memory]), compare(steeper)]),
        f"Time grows with the power {statistics.fmean(time['factors']):.2f} of the length by factors, "
        f"{statistics.fmean(time['torch']):.2f} by torch's exact product; memory with {statistics.fmean(memory):.2f}. "
        f"At {lengths[0]} tokens factors take {statistics.fmean(ratios[0]):.2g} times torch's time, at {lengths[-1]} "
        f"{statistics.fmean(ratios[-1]):.2g} times.",
        [
            Panel("Forward and backward", "time, ratio to torch", {"factors": ratios}, lengths, "tokens", True, True),
            Panel("Growth of time", "slope of log time over log length", {s: [v] for s, v in time.items()}),
        ],
        notes=[
            f"Largest relative error of a gradient: {worst:.0e}. Probabilities held as a matrix: memory {matrix:.2f}.",
            "Heads of width 4 are far below those of today's models: 70 features here are 814,385 at width 64 and "
            "degree 4. This is an algorithm for small heads, and no faster attention.",
        ],
    )


STEPS, BATCH, OUT, RATE = 200, 32, 5, 0.005
Learn = Callable[..., Gradients]


def regression(gradients: Learn, seed: int, larger: float, steps: int) -> list[float]:
    """Return the losses of a LoRA on the queries and values of one head that learns another head's outputs."""
    x = drawn(1000 * seed, BATCH, 8) * 0.3
    w = {n: drawn(1000 * seed + i, size, 8) * 0.25 for i, (n, size) in enumerate((("q", 4), ("k", 4), ("v", OUT)), 1)}
    moved = {
        n: w[n] + 0.2 * drawn(1000 * seed + 7 + i, w[n].shape[0], 2) @ drawn(1000 * seed + 9 + i, 2, 8)
        for i, n in enumerate("qv")
    }
    target = (x @ moved["q"].T @ (x @ w["k"].T).T).softmax(-1) @ x @ moved["v"].T
    w["q"] = w["q"] * larger
    factors = {
        n: [drawn(1000 * seed + 20 + i, RANK, 8) * 0.3, torch.zeros(len(w[n]), RANK).double()]
        for i, n in enumerate("qv")
    }
    moments = [[torch.zeros_like(t) for t in pair] for pair in factors.values() for _ in range(2)]
    losses = []
    for step in range(steps):
        q, v = (x @ (w[n] + factors[n][1] @ factors[n][0]).T for n in "qv")
        k = x @ w["k"].T
        apart = ((q @ k.T).softmax(-1) @ v - target) / BATCH
        losses.append(float(apart.square().sum() * BATCH / 2))
        found = gradients(q, k, v, apart, scaling=1.0)
        for number, (n, gradient) in enumerate((("q", found.q), ("v", found.v))):
            ours = factor_gradients(x, factors[n][0], factors[n][1], 1.0, gradient)
            first, second = moments[2 * number], moments[2 * number + 1]
            for i, g in enumerate(ours):
                first[i] = 0.9 * first[i] + 0.1 * g
                second[i] = 0.99 * second[i] + 0.01 * g.square()
                up = first[i] / (1 - 0.9 ** (step + 1))
                factors[n][i] = factors[n][i] - RATE * up / ((second[i] / (1 - 0.99 ** (step + 1))).sqrt() + 1e-8)
    return losses


@claim(
    "computational-limits",
    "training",
    says="Training by factors ends where exact training does, below the bound; above it, the guard refuses.",
    source=f"{PAPER}, Theorem 3.1",
    trial=f"{STEPS} Adam steps at {RATE} of a LoRA of rank {RANK} on queries and values of one head that learns the "
    "outputs of another, with gradients by factors at a tolerance of 1e-3 and exact ones, in float64; then the frozen "
    "query weight times 16. Against: final losses more than 1 % apart below, or no refusal above.",
)
def training(setting: Setting) -> Finding:
    """Losses by factors and exactly, and what becomes of queries that are too large."""
    steps = setting.much(STEPS, 3)
    exact = [regression(exact_gradients, seed, 1.0, steps) for seed in setting.seeds]
    ours = [regression(fast_gradients, seed, 1.0, steps) for seed in setting.seeds]
    apart = [abs(a[-1] / b[-1] - 1) for a, b in zip(ours, exact, strict=True)]
    refusals = [_refusal(seed, steps) for seed in setting.seeds]
    marks = sorted({0, steps // 4, steps // 2, 3 * steps // 4, steps - 1})

    def course(rows: list[list[float]]) -> list[list[float]]:
        return [[row[at] for row in rows] for at in marks]

    series: Mapping[str, list[list[float]]] = {"exact": course(exact), "factors": course(ours)}
    return Finding(
        together([compare([0.01 - a for a in apart]), compare([1.0 if r else -1.0 for r in refusals])]),
        f"Final losses are {max(apart):.1e} apart at most ({statistics.fmean(r[-1] for r in ours):.1e} by factors, "
        f"{statistics.fmean(r[0] for r in ours):.1e} at the start). With 16 times the query weight "
        f"{sum(map(bool, refusals))} of {len(refusals)} runs are refused.",
        [Panel("One-head regression", "loss", series, marks, "step", log_y=True)],
        notes=[f"The refusal: {next(filter(None, refusals), 'none')}"],
    )


def _refusal(seed: int, steps: int) -> str:
    try:
        regression(fast_gradients, seed, 16.0, steps)
    except AttentionError as refusal:
        return str(refusal)
    return ""
