"""LoRA-GGPO: noise on the weight, by the norms of its rows and of their gradients (arXiv 2502.14538 v1)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from lorry.core.method.families import norms_of_sum
from lorry.core.options import option
from lorry.training.hooks import Dynamic, Moment, register_dynamic
from lorry.training.low_rank import Pair, Rows, changed_outputs, own_rows, pairs_of


@register_dynamic("lora-ggpo")
@dataclass(frozen=True)
class LoRAGGPO(Dynamic):
    """Trains under noise on the weight ``W' = W + scale · B A``: the loss is ``E[L(W' + e)]``.

    Row i of e is ``N(0, sigma² / n · (|W'_i|² + beta · g_i²) I_n)``, where n is the input's width and g_i the norm of
    row i of ``scale · (B dA + dB A)``, from the clipped gradients of the step before. ``beta: 0`` is Flat-LoRA
    (arXiv 2409.14396). One draw serves all micro-batches of a step; evaluation has none.

    The noise is a term ``e x`` of the job's own rows, beside dropout and scale, so the base keeps its bytes and other
    jobs do not see it. ``chunk`` rows of e are drawn at a time, once forward and once backward.

    Public code differs from this law: one adds a norm to a squared norm and divides by the output's width, another
    perturbs the factors for good.
    """

    reads_base: ClassVar[bool] = True
    neutral: ClassVar = {"sigma": 0.0}
    apart: ClassVar = {
        "lora-mgpo": "they are two ways of one perturbation",
        "relora": "where trained tensors change, the gradient of the step before is not theirs",
        "plora": "where trained tensors change, the gradient of the step before is not theirs",
        "delta-lora": "where trained tensors change, the gradient of the step before is not theirs",
    }

    sigma: float = option(0.03, "Norm of the noise of a row, relative to the row.", at_least=0)
    beta: float = option(
        0.01, "Weight of the gradient's norm; it has a unit, the squared ratio of weights to gradients.", at_least=0
    )
    most: float = option(1.0, "Largest part of the gradient's norm, relative to that of the row.", above=0)
    smoothing: float = option(0.0, "What stays of the gradient's norms from one step to the next.", at_least=0, below=1)
    schedule: str = option(
        "constant", "Course of sigma: constant, or rising from 0 along a cosine.", choices=("constant", "cosine-ramp")
    )
    chunk: int = option(
        512, "Rows of the noise in memory at a time; 0 holds all of them, for as long as the pass.", at_least=0
    )

    def begin(self, at: Moment) -> None:
        """Look whether it can act at every site."""
        if self.sigma:
            pairs_of(at.adapter, self.name)

    def strength(self, step: int, total: int) -> float:
        """Return sigma at a step."""
        return self.sigma * (0.5 * (1 - math.cos(math.pi * step / total)) if self.schedule == "cosine-ramp" else 1.0)

    def deviations(self, at: Moment, pair: Pair) -> Tensor:
        """Return the standard deviation of the noise in each row of a site, ``(out,)``."""
        with torch.no_grad():
            squares = norms_of_sum(pair.entry.site, pair.a.detach(), pair.b.detach(), pair.scale).square()
            known = at.state.get(pair.path)
            if known is not None and self.beta:
                squares = squares + torch.minimum(self.beta * known.to(squares).square(), self.most * squares)
            return squares.sqrt() * (self.strength(at.step, at.total) / math.sqrt(pair.a.shape[-1]))

    def around_pass(self, at: Moment) -> AbstractContextManager[Any]:
        """Add the noise's part of the output."""
        return self._noisy(at) if self.strength(at.step, at.total) else nullcontext()

    @contextmanager
    def _noisy(self, at: Moment) -> Iterator[None]:
        assert at.rows is not None
        rows = at.rows
        noises = {
            pair.path: Noise(
                self.deviations(at, pair), pair.a.shape[-1], self.chunk, at.generator(pair.path).initial_seed()
            )
            for pair in pairs_of(at.adapter, self.name)
        }

        def change(path: str, x: Tensor, y: Tensor) -> Tensor:
            found: Tensor = _Noisy.apply(y, x, noises[path], rows)  # type: ignore[no-untyped-call]
            return found

        with changed_outputs(at.adapter, change):
            yield

    def after_clipping(self, at: Moment) -> None:
        """Remember the norm of each row of the gradient that the factors see."""
        if not self.sigma or not self.beta:
            return
        for pair in pairs_of(at.adapter, self.name):
            norms = gradient_norms(pair, at.groups.gradients())
            kept = at.state.get(pair.path)
            if kept is not None and self.smoothing:
                norms = kept.to(norms) * self.smoothing + norms * (1 - self.smoothing)
            at.state[pair.path] = norms


def gradient_norms(pair: Pair, gradients: dict[str, Tensor]) -> Tensor:
    """Return the norms of the rows of ``scale · (B dA + dB A)`` as ``(out,)``, without that matrix.

    Equal to those of ``scale² (B Bᵀ G + G Aᵀ A)`` for the gradient G of the weight; the part of a frozen factor is left
    out.
    """
    exact = torch.promote_types(pair.a.dtype, torch.float32)
    a, b = pair.a.detach().to(exact), pair.b.detach().to(exact)
    da = gradients.get(f"{pair.path}.A")
    db = gradients.get(f"{pair.path}.B")
    left = torch.cat([b if da is not None else b[:, :0], db.to(exact) if db is not None else b[:, :0]], 1)
    right = torch.cat([da.to(exact) if da is not None else a[:0], a if db is not None else a[:0]], 0)
    return ((left @ (right @ right.mT)) * left).sum(-1).clamp_min(0).sqrt() * abs(pair.scale)


class Noise:
    """Noise on a weight ``(out, in)``, drawn some rows at a time and the same each time.

    Parameters
    ----------
    deviations
        Standard deviation of each row, ``(out,)``.
    width
        Columns.
    chunk
        Rows that are drawn at a time; 0 keeps all of them.
    seed
        Of the draw; with the same chunk it gives the same noise.
    """

    def __init__(self, deviations: Tensor, width: int, chunk: int, seed: int) -> None:
        self.deviations, self.width, self.seed = deviations, width, seed
        self.chunk = chunk or len(deviations)
        self._kept = list(self._draw()) if not chunk else None

    def _draw(self) -> Iterator[tuple[slice, Tensor]]:
        generator = torch.Generator().manual_seed(self.seed)
        for start in range(0, len(self.deviations), self.chunk):
            part = slice(start, min(start + self.chunk, len(self.deviations)))
            drawn = torch.randn(part.stop - part.start, self.width, generator=generator)
            yield part, drawn.to(self.deviations) * self.deviations[part, None]

    def chunks(self) -> Iterator[tuple[slice, Tensor]]:
        """Yield places of rows and the noise there."""
        return iter(self._kept) if self._kept is not None else self._draw()


class _Noisy(torch.autograd.Function):
    """``y + e x`` in the rows of one job, with e drawn again for the backward pass."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, noise: Noise, rows: Rows) -> Tensor:
        ctx.facts, ctx.like = (noise, rows), (x.shape, x.dtype)
        found = y.clone(memory_format=torch.contiguous_format)
        seen, own = own_rows(x, rows), own_rows(found, rows)
        for part, drawn in noise.chunks():
            own[..., part] += (seen.to(drawn.dtype) @ drawn.mT).to(own.dtype)
        return found

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        (dy,) = gradients
        noise, rows = ctx.facts
        dx = None
        if ctx.needs_input_grad[1]:
            shape, dtype = ctx.like
            total = torch.zeros(shape, dtype=dtype, device=dy.device)
            own, back = own_rows(total, rows), own_rows(dy, rows)
            for part, drawn in noise.chunks():
                own += (back[..., part].to(drawn.dtype) @ drawn).to(dtype)
            dx = total
        return dy, dx, None, None
