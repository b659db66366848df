"""A layer with LoRA, forward and backward, fused against plain torch, and on a GPU against the roofline.

The roofline is the time that the products take at the speed of a large product, or the least that must be moved at the
speed of a large copy, whichever is longer; both speeds are measured first.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorry.bench._count import kept
from lorry.bench._measure import integers, interleaved, lines, machine, ratios, threads
from lorry.bench._registry import register
from lorry.core.errors import OptionError
from lorry.kernels.lowrank import low_rank_linear
from lorry.kernels.segments import LowRankPair, Segment
from lorry.kernels.traffic import Layer

_NO_GPU = (
    "There is no GPU here, so the forms for the CPU were measured; the Triton kernels and the roofline need a GPU."
)
_SCALE = 2.0


def run(
    rounds: int = 11,
    widths: str | None = None,
    tokens: int | None = None,
    rank: int = 16,
    dropout: float = 0.1,
    adapters: int = 4,
    dtype: str | None = None,
    device: str = "auto",
) -> dict[str, Any]:
    """Measure square layers of each width: one adapter with and without dropout, and `adapters` in one packed batch.

    Parameters
    ----------
    rounds
        Rounds in which all cases run once.
    widths, tokens, dtype
        On a GPU 2048, 4096 and 8192 with 8,192 tokens in bfloat16 unless given, else 1024 with 4,096 in float32.
    rank
        Of every adapter of its own; those of a packed batch have a quarter, half, all and twice of it in turn.
    dropout
        Probability, in the cases with dropout.
    adapters
        Number of adapters in the packed batch.
    device
        ``cuda``, ``cpu``, or ``auto`` for a GPU where there is one.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise OptionError("Expected a GPU for device=cuda, and PyTorch finds none. Leave the option out for the CPU.")
    gpu = device == "cuda"
    kind = getattr(torch, dtype or ("bfloat16" if gpu else "float32"))
    count = tokens or (8192 if gpu else 4096)
    result: dict[str, Any] = {"tokens": count, "rank": rank, "dtype": str(kind).removeprefix("torch."), "widths": {}}
    with threads(1):
        result["machine"] = machine(device)
        speeds = _speeds(kind) if gpu else None
        for width in integers(widths or ("2048,4096,8192" if gpu else "1024")):
            problem = _Problem(count, width, rank, adapters, kind, device)
            result["widths"][width] = problem.measured(rounds, dropout, speeds)
    if speeds is None:
        result["note"] = _NO_GPU
    else:
        from lorry.kernels.triton_tiles import choices

        result["speeds"] = {"operations per second": speeds[0], "bytes per second": speeds[1]}
        result["tiles"] = choices()
    return result


class _Problem:
    """A frozen square layer, an input, and the adapters of its cases."""

    def __init__(self, tokens: int, width: int, rank: int, adapters: int, kind: torch.dtype, device: str) -> None:
        generator = torch.Generator().manual_seed(0)

        def draw(*shape: int) -> Tensor:
            return (torch.randn(shape, generator=generator) / shape[-1] ** 0.5).to(device, kind)

        self.device, self.sizes = device, (tokens, width, width, rank)
        self.x, self.weight, self.grad = draw(tokens, width).requires_grad_(), draw(width, width), draw(tokens, width)
        self.one = [(draw(rank, width).requires_grad_(), draw(width, rank).requires_grad_())]
        ranks = [max(rank * (1, 2, 4, 8)[i % 4] // 4, 1) for i in range(adapters)]
        self.many = [(draw(r, width).requires_grad_(), draw(width, r).requires_grad_()) for r in ranks]
        shares = [2 + i % 3 for i in range(adapters)]  # segments are ragged
        cuts = [tokens * sum(shares[:i]) // sum(shares) for i in range(adapters + 1)]
        self.parts = [slice(first, last) for first, last in zip(cuts, cuts[1:], strict=False)]

    def step(self, forward: Callable[[], Tensor], factors: Sequence[tuple[Tensor, Tensor]]) -> Callable[[], object]:
        """Return a case: forward, and the gradients of x and of the factors."""
        leaves = [self.x, *(t for pair in factors for t in pair)]
        return lambda: torch.autograd.grad(forward(), leaves, self.grad)

    def base(self) -> Tensor:
        """Return the frozen layer's output."""
        return F.linear(self.x, self.weight)

    def plain(self, p: float, parts: Sequence[slice], factors: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        """Return the output by plain operations."""
        each = []
        for rows, (a, b) in zip(parts, factors, strict=True):
            part = self.x[rows]
            update = F.linear(F.linear(F.dropout(part, p) if p else part, a), b) * _SCALE
            each.append(update)
        return self.base() + (each[0] if len(each) == 1 else torch.cat(each))

    def fused(
        self, p: float, parts: Sequence[slice | None], factors: Sequence[tuple[Tensor, Tensor]], plans: dict[Any, Any]
    ) -> Tensor:
        """Return the output by Lorry's operation."""
        segments = [Segment(rows, _SCALE, p, 7 + number) for number, rows in enumerate(parts)]
        pairs = [LowRankPair(a, b) for a, b in factors]
        return low_rank_linear(self.x, self.weight, None, None, segments, pairs, plans)

    def measured(self, rounds: int, p: float, speeds: tuple[float, float] | None) -> dict[str, Any]:
        """Return ratios of all cases, bytes kept for the backward pass, and shares of the roofline."""
        plans: dict[Any, Any] = {}
        whole = [slice(0, len(self.x))]
        cases: dict[str, tuple[Callable[[], Tensor], list[tuple[Tensor, Tensor]]]] = {
            "base": (self.base, []),
            "plain": (lambda: self.plain(0.0, whole, self.one), self.one),
            "fused": (lambda: self.fused(0.0, [None], self.one, plans), self.one),
            "plain, dropout": (lambda: self.plain(p, whole, self.one), self.one),
            "fused, dropout": (lambda: self.fused(p, [None], self.one, plans), self.one),
            "plain, packed": (lambda: self.plain(p, self.parts, self.many), self.many),
            "fused, packed": (lambda: self.fused(p, self.parts, self.many, plans), self.many),
        }
        steps = {name: self.step(forward, factors) for name, (forward, factors) in cases.items()}
        seconds = interleaved(steps, rounds, self.device, repeat=20 if self.device == "cuda" else 1)
        kinds = ("", ", dropout", ", packed")
        found: dict[str, Any] = {
            "to base": ratios(seconds, "base"),
            "plain to fused": {f"plain{kind}": ratios(seconds, f"fused{kind}")[f"plain{kind}"] for kind in kinds},
            "kept": {name: self._kept(step) for name, step in steps.items()},
            "traffic": self._traffic(),
        }
        if speeds is not None:
            layer, size = Layer(*self.sizes), self.x.itemsize
            least = max(layer.operations() / speeds[0], layer.least().both * size / speeds[1])
            medians = {name: statistics.median(seconds[name]) for name in cases if "packed" not in name}
            found["of roofline"] = {name: least / median for name, median in medians.items() if name != "base"}
        return found

    def _kept(self, step: Callable[[], object]) -> int:
        parameters = [t for pair in (*self.one, *self.many) for t in pair]
        own = nn.ParameterList([self.weight, *parameters])
        return kept(own, step)

    def _traffic(self) -> dict[str, float]:
        """Return what the kernels move, as a share of what plain operations do, by count."""
        shares = {}
        for name, drops in (("without dropout", False), ("with dropout", True)):
            layer = Layer(*self.sizes, drops=drops)
            shares[name] = layer.tiled().both / layer.plain().both
        return shares


def _speeds(kind: torch.dtype) -> tuple[float, float]:
    """Return operations per second of a large product, and bytes per second of a large copy, on the GPU."""
    left, right = (torch.randn(8192, 8192, device="cuda", dtype=kind) for _ in range(2))
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    cases = {"product": lambda: left @ right, "copy": lambda: target.copy_(source)}
    seconds = {name: min(each) for name, each in interleaved(cases, 7, "cuda", repeat=10).items()}
    return 2 * 8192**3 / seconds["product"], 2 * source.numel() / seconds["copy"]


def table(result: dict[str, Any]) -> Any:
    """Return a rich table for each width, and what could not be measured."""
    from rich.console import Group

    shown: list[Any] = []
    for width, found in result["widths"].items():
        setting = f"{result['tokens']} tokens, rank {result['rank']}, {result['dtype']}, {result['machine']}"
        roofline = found.get("of roofline", {})
        rows = [
            (
                name,
                ratio["ratio"],
                f"{ratio['least']:.2f} - {ratio['most']:.2f}",
                f"{found['kept'][name] / 1e6:.1f}",
                f"{roofline[name]:.2f}" if name in roofline else "",
            )
            for name, ratio in found["to base"].items()
        ]
        columns = ("case", "median ratio to base", "least - most", "kept MB", "of roofline")
        used = len(columns) if roofline else len(columns) - 1
        shown.append(lines(f"width {width}, {setting}", columns[:used], [row[:used] for row in rows]))
        speedups = [f"{name} {each['ratio']:.2f}" for name, each in found["plain to fused"].items()]
        moved = [f"{share:.2f} {name}" for name, share in found["traffic"].items()]
        shown.append(f"Time relative to fused: {', '.join(speedups)}.")
        shown.append(f"Of what plain operations move the kernels move {' and '.join(moved)}, by count.")
    return Group(*shown, *([result["note"]] if "note" in result else []))


register("kernels", run, table, help=__doc__)
