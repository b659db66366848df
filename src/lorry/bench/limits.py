"""Gradients of attention by low-rank factors against torch's own product, over growing lengths, in small heads.

Both sides are a forward and a backward pass of one head in float32. What is reported is the growth: the slope of the
logarithm of time and of memory over the logarithm of the length, 1 for linear and 2 for quadratic, and the ratio of the
two sides at each length.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lorry.attention import Approximation, exact_gradients, fast_attention, fast_gradients
from lorry.bench._measure import integers, interleaved, lines, machine, threads
from lorry.bench._registry import register
from lorry.core.errors import OptionError
from lorry.training.live import Live

#: Beyond this a matrix of length x length is not made to compare with.
_MOST_EXACT = 2048


def run(
    lengths: str = "512,1024,2048,4096,8192",
    width: int = 4,
    degree: int = 4,
    gamma: float = 0.25,
    causal: bool = False,
    rounds: int = 3,
) -> dict[str, Any]:
    """Measure heads of `width` whose queries and keys have entries up to `gamma`, at a polynomial of `degree`.

    The third side, *matrix*, is the closed form with all probabilities in memory, as the definition has it.
    """
    chosen = integers(lengths)
    if len(chosen) < 2 or min(chosen) < 2:
        raise OptionError(f"lengths must be at least two numbers of tokens from 2, found {lengths!r}.")
    how = Approximation(degree=degree, max_features=10**6)
    found: dict[str, Any] = {}
    with threads(1):
        for length in chosen:
            found[str(length)] = _at(length, width, gamma, causal, how, rounds)
    slopes: dict[str, dict[str, float]] = {"seconds": {}, "bytes": {}}
    for side in ("factors", "torch", "matrix"):
        measured = [n for n in chosen if side in found[str(n)]["seconds"]]
        for key, of in slopes.items():
            if len(measured) > 1:
                of[side] = slope(measured, [found[str(n)][key][side] for n in measured])
    return {
        "machine": machine("cpu"),
        "width": width,
        "degree": degree,
        "gamma": gamma,
        "causal": causal,
        "lengths": {n: {k: v for k, v in row.items() if k != "seconds"} for n, row in found.items()},
        "slopes": slopes,
    }


def _at(length: int, width: int, gamma: float, causal: bool, how: Approximation, rounds: int) -> dict[str, Any]:
    """Measure at one length."""
    generator = torch.Generator().manual_seed(length)
    q, k, v, gradient = (torch.randn(1, 1, length, width, generator=generator) for _ in range(4))
    q, k = (t * (gamma / t.abs().max()) for t in (q, k))

    def passes(attend: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Callable[[], object]:
        def go() -> object:
            leaves = [t.clone().requires_grad_() for t in (q, k, v)]
            attend(*leaves).backward(gradient)
            return leaves

        return go

    cases: dict[str, Callable[[], object]] = {
        "factors": passes(lambda q, k, v: fast_attention(q, k, v, scaling=1.0, causal=causal, how=how)),
        "torch": passes(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=1.0)),
        "matrix": lambda: exact_gradients(q, k, v, gradient, scaling=1.0, causal=causal),
    }
    if length > _MOST_EXACT:
        del cases["matrix"]
    seconds = interleaved(cases, rounds, warm_up=1)
    memory = {}
    for name, case in cases.items():
        with Live() as live:
            case()
        memory[name] = live.most
    ratios = [a / b for a, b in zip(seconds["factors"], seconds["torch"], strict=True)]
    wide = [t.double() for t in (q, k, v, gradient)]
    part = min(length, _MOST_EXACT)
    wide = [t[..., :part, :] for t in wide]
    exact = exact_gradients(*wide, scaling=1.0, causal=causal)
    ours = fast_gradients(*wide, scaling=1.0, causal=causal, how=how)
    return {
        "seconds": {name: statistics.median(each) for name, each in seconds.items()},
        "ratio to torch": {"ratio": statistics.median(ratios), "least": min(ratios), "most": max(ratios)},
        "bytes": memory,
        "relative error": max(float((a - b).norm() / b.norm()) for a, b in zip(ours, exact, strict=True)),
    }


def slope(lengths: Sequence[int], values: Sequence[float]) -> float:
    """Return the slope of the logarithm of values over that of lengths, by least squares."""
    x = [math.log(n) for n in lengths]
    return statistics.linear_regression(x, [math.log(v) for v in values]).slope


def table(result: dict[str, Any]) -> Any:
    """Return slopes and ratios as rich tables."""
    from rich.console import Group

    slopes, rows = result["slopes"], result["lengths"]
    kind = "causal " if result["causal"] else ""
    title = f"{kind}heads of width {result['width']}, degree {result['degree']}, {result['machine']}"
    growth = [(side, slopes["seconds"][side], slopes["bytes"][side]) for side in slopes["seconds"]]
    each = [
        (
            length,
            row["ratio to torch"]["ratio"],
            f"{row['ratio to torch']['least']:.2f} - {row['ratio to torch']['most']:.2f}",
            row["bytes"]["factors"] / row["bytes"]["torch"],
            row["relative error"],
        )
        for length, row in rows.items()
    ]
    return Group(
        lines(f"Growth with the length, {title}", ("side", "slope of time", "slope of memory"), growth),
        lines("Factors against torch", ("tokens", "ratio of time", "least - most", "ratio of memory", "error"), each),
    )


register("limits", run, table, help=__doc__)
