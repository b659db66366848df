"""ALLoRA: a rate for each output row that falls as the row grows (Huang and Balestriero 2024, arXiv 2410.09692)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from lorry.core.errors import OptionError
from lorry.core.options import option
from lorry.training.hooks import Dynamic, Moment, register_dynamic
from lorry.training.low_rank import Pair, Rows, changed_outputs, own_rows, pairs_of


@register_dynamic("allora")
@dataclass(frozen=True)
class ALLoRA(Dynamic):
    """Gives row i of the update ``ΔW = scale · B A`` the gain ``c_i = 1 / sqrt(|ΔW_i| + 1 / eta2)``.

    The gain is a number, not a function to differentiate. It is eta at the start, where B is zero. With
    ``where: grad`` it multiplies the gradient of the adapter's output, row by row, so that ``dB = diag(c) dB`` and
    ``dA = Bᵀ diag(c) G``; the optimizer's own scaling comes after it, and clipping too. Optimizers like Adam divide
    such a gain out again: with them, only ``where: update``, which multiplies what the optimizer did to row i of B by
    c_i and what it did to A by the mean of c, is an adaptive rate.

    The paper has neither alpha nor dropout: leave alpha at the rank. Optimizers elsewhere take the norm of each
    factor's own rows and keep its first value for good, which is a constant; here c is worked out anew for each step,
    from the product.
    """

    neutral: ClassVar = {"gain": "none"}
    apart: ClassVar = {
        "dp-sgd": "it puts the sum of clipped gradients of single rows in the place of what ALLoRA scaled",
        "relora": "the gain would be that of what is trained and of what is merged together",
        "plora": "the gain would be that of what is trained and of what is merged together",
        "delta-lora": "the gain would be that of what is trained and of what is merged together",
    }

    eta2: float = option(4.0, "Square of the gain at the start, eta.", above=0)
    gain: str = option(
        "row",
        "By what the gain falls: the norm of each row, of the matrix, of each token's output; or constant, or none.",
        choices=("row", "matrix", "output", "constant", "none"),
    )
    where: str = option(
        "grad", "What is multiplied: the gradient, or the optimizer's update.", choices=("grad", "update")
    )
    scale_input_grad: bool = option(False, "Multiply what earlier layers learn through the adapter, too.")

    def check(self) -> None:
        """Refuse what belongs to the gradient together with the update."""
        if self.where == "update" and (self.gain == "output" or self.scale_input_grad):
            raise OptionError(
                "ALLoRA: the gain by output and scale_input_grad act on gradients of single tokens; use them with "
                "where: grad."
            )

    def begin(self, at: Moment) -> None:
        """Look whether it can act at every site."""
        if self.gain != "none":
            pairs_of(at.adapter, self.name, own=self.where == "update", dropout=False)

    def factor(self, pair: Pair, x: Tensor | None = None) -> Tensor:
        """Return the gain ``(out,)``, a single one, or for inputs `x` ``(rows, tokens, in)`` one of each token."""
        with torch.no_grad():
            norms = pair.row_norms()
            if self.gain == "matrix":
                norms = torch.linalg.vector_norm(norms)
            elif self.gain == "output":
                assert x is not None
                exact = norms.dtype
                norms = ((x.to(exact) @ pair.a.to(exact).mT) @ pair.b.to(exact).mT).norm(dim=-1, keepdim=True)
                norms = norms * abs(pair.scale)
            elif self.gain == "constant":
                norms = torch.zeros_like(norms[:1])
            return (norms + 1 / self.eta2).rsqrt()

    def around_pass(self, at: Moment) -> AbstractContextManager[Any]:
        """Multiply the gradient on its way from the adapter's output to its factors."""
        return nullcontext() if self.gain == "none" or self.where == "update" else self._gained(at)

    @contextmanager
    def _gained(self, at: Moment) -> Iterator[None]:
        assert at.rows is not None
        rows = at.rows
        pairs = {pair.path: pair for pair in pairs_of(at.adapter, self.name)}
        fixed = None if self.gain == "output" else {path: self.factor(pair) for path, pair in pairs.items()}

        def change(path: str, x: Tensor, y: Tensor) -> Tensor:
            pair = pairs[path]
            gain = self.factor(pair, own_rows(x.detach(), rows)) if fixed is None else fixed[path]
            rest = (gain, pair.scale, rows, self.scale_input_grad)
            found: Tensor = _Gained.apply(y, x, pair.a, pair.b, *rest)  # type: ignore[no-untyped-call]
            return found

        with changed_outputs(at.adapter, change):
            yield

    def after_clipping(self, at: Moment) -> None:
        """Keep what the optimizer is about to change, and the gain."""
        if self.where == "grad" or self.gain == "none":
            return
        trained = at.groups.parameters()
        for pair in pairs_of(at.adapter, self.name, own=True):
            gain = self.factor(pair)
            for key, factor in (("B", gain.unsqueeze(-1)), ("A", gain.mean())):
                name = f"{pair.path}.{key}"
                if name in trained:
                    at.state[f"{name}/before"], at.state[f"{name}/gain"] = trained[name].detach().clone(), factor

    def after_step(self, at: Moment) -> None:
        """Multiply what the optimizer changed."""
        for name, parameter in at.groups.parameters().items():
            before = at.state.pop(f"{name}/before", None)
            if before is not None:
                gain = at.state.pop(f"{name}/gain").to(before.dtype)
                parameter.copy_(before + gain * (parameter - before))


class _Gained(torch.autograd.Function):
    """The output as it is; backward, what the factors get more because of the gain."""

    @staticmethod
    def forward(
        ctx: Any, y: Tensor, x: Tensor, a: Tensor, b: Tensor, gain: Tensor, scale: float, rows: Rows, through: bool
    ) -> Tensor:
        ctx.save_for_backward(x, a, b, gain)
        ctx.facts = scale, rows, through
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        (dy,) = gradients
        x, a, b, gain = ctx.saved_tensors
        scale, rows, through = ctx.facts
        seen = own_rows(x, rows).flatten(0, 1).to(a.dtype)
        more = own_rows(dy, rows).to(a.dtype) * ((gain - 1) * scale).to(a.dtype)
        more = more.flatten(0, 1)
        back = more @ b
        da = back.mT @ seen if ctx.needs_input_grad[2] else None
        db = more.mT @ (seen @ a.mT) if ctx.needs_input_grad[3] else None
        dx = None
        if through and ctx.needs_input_grad[1]:
            dx = torch.zeros(x.shape, dtype=x.dtype, device=x.device)
            own = own_rows(dx, rows)
            own.copy_((back @ a).view(own.shape))
        return dy, dx, da, db, None, None, None, None
