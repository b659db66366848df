"""FlyLoRA: each rank is an expert, and a frozen sparse random A both projects and chooses them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self, cast

import torch
from torch import Generator, Tensor

from lorry.core.errors import AdapterError, OptionError
from lorry.core.method.base import Expert
from lorry.core.method.call import Call
from lorry.core.method.families import Bottleneck
from lorry.core.method.registry import register
from lorry.core.method.spec import Init, Tensors, TensorSpec
from lorry.core.options import option
from lorry.core.sites.site import Site
from lorry.methods.parts.routing import balance_step, counts, precise, report, top_k_mask


def distinct_columns(width: int) -> Init:
    """Return an initialiser that draws different columns below `width` for each row, in ascending order."""

    def draw(tensor: Tensor, generator: Generator) -> None:
        scores = torch.rand((tensor.shape[0], width), generator=generator)
        tensor.copy_(scores.topk(tensor.shape[1], dim=-1).indices.sort(-1).values)

    return draw


_SELECT = ("signed", "magnitude", "all")
#: Options in which adapters that are merged may differ, at values of no meaning.
_FREE = {"tasks": 1, "alpha": None, "rate": 0.0, "dropout": 0.0}


@register("flylora", paper="arXiv 2510.08396", kinds=lambda kind: kind.additive)
@dataclass(frozen=True)
class FlyLoRA(Bottleneck):
    """``ΔW x = alpha/rank · B top_k(A x)`` with A frozen: `density` of each row is nonzero, drawn from N(0,
    1/rank²) (section 3).

    The k units with the highest ``A x + d`` fire; d balances the load without a loss and never enters a value
    (equations 8 to 10). With ``top_k = rank`` this is LoRA with a frozen A and fuses exactly. Paper and
    published programs disagree twice: equation 8 and the small program select by magnitude, equation 10 and
    the program of the experiments by signed value (default; a bias cannot balance magnitudes); that program
    also computes A x without a gradient to x (``grad_to_input=False``), against equation 6. Loads are counted
    in training and d moves once after an optimizer step, not in each forward as there.

    Adapters of several tasks can be merged into one, see `lorry.formats.mixture`: with ``tasks`` above 1 the rank units
    of each task choose among themselves, so the result is the weighted sum of what the adapters compute. The formula
    of the paper's section on merging, ``Σ w B A``, has no choice any more: that is ``select="all"``.

    Use it where several adapters will be merged later or must disturb each other little, and where only B should be
    trained.
    """

    rank: int = option(32, "Rank units of a task, each an expert.", at_least=1)
    top_k: int = option(8, "Rank units that fire for a token.", at_least=1)
    density: float | None = option(
        None, "Share of nonzero entries in each row of A; top_k/rank if not given.", above=0, at_most=1
    )
    alpha: float | None = option(None, "Numerator of the scale alpha/rank; twice the rank if not given.", above=0)
    rate: float = option(1e-3, "Step of the balance bias; 0 turns balancing off.", at_least=0)
    select: str = option(
        "signed", "Choose by value or by magnitude, or let all fire.", choices=("signed", "magnitude", "all")
    )
    grad_to_input: bool = option(True, "Let the gradient flow to the layer's input through the update.")
    tasks: int = option(1, "Tasks that were merged, each with rank units of its own.", at_least=1)
    dropout: float = option(0.0, "Fraction of the update's input that is dropped in training.", at_least=0, below=1)

    def check(self) -> None:
        """Refuse more active units than there are."""
        if self.top_k > self.rank:
            raise OptionError(f"FlyLoRA: top_k must be at most rank, found top_k={self.top_k} and rank={self.rank}.")

    def nonzeros(self, site: Site) -> int:
        """Return the number of nonzero entries in each row of A."""
        density = self.top_k / self.rank if self.density is None else self.density
        return max(1, int(site.in_features * density))

    def tensors(self, site: Site) -> dict[str, TensorSpec]:
        """Return A as positions and values ``(tasks · rank, nonzeros)``, the trained B, and the bias of the
        selection.
        """
        units = self.tasks * self.rank
        shape = (units, self.nonzeros(site))
        return {
            "positions": TensorSpec(
                shape,
                distinct_columns(site.in_features),
                trained=False,
                dtype=torch.int32,
                within=range(site.in_features),
            ),
            "values": TensorSpec(shape, lambda t, g: t.normal_(0, 1 / self.rank, generator=g), trained=False),
            "B": TensorSpec((site.out_features, units)),
            "bias": TensorSpec((units,), trained=False, dtype=torch.float32),
        }

    def with_experts(self, experts: Sequence[Expert]) -> Self:
        """Return the method of these adapters side by side: their own options, but ``select="all"`` if it is asked for.

        Raises
        ------
        AdapterError
            One is of another method, or differs in an option that decides what it computes.
        """
        methods = [expert.method for expert in experts]
        first, *others = (m.with_options(**_FREE) if isinstance(m, FlyLoRA) else m for m in methods)
        for expert, method in zip(experts[1:], others, strict=True):
            if method != first:
                raise AdapterError(
                    f"FlyLoRA merges adapters of one rank, top_k, density and select: '{experts[0].name}' is "
                    f"{first}, '{expert.name}' is {method}."
                )
        if not isinstance(first, FlyLoRA):
            raise AdapterError(
                f"FlyLoRA merges FlyLoRA adapters, but '{experts[0].name}' is {type(first).__name__}; use another "
                "merge method."
            )
        tasks = sum(m.tasks for m in methods if isinstance(m, FlyLoRA))
        select = "all" if self.select == "all" else first.select
        return self.with_options(
            rank=first.rank,
            top_k=first.top_k,
            density=first.density,
            select=select,
            tasks=tasks,
            alpha=None,
            grad_to_input=first.grad_to_input,
        )

    def adopt(self, tensors: Tensors, site: Site, experts: Sequence[Expert]) -> float:
        """Lay the adapters side by side, each with its weight and scale in its B."""
        for name in ("positions", "values", "bias"):
            tensors[name].copy_(torch.cat([expert.tensors[name] for expert in experts]))
        shares = [e.weight / len(experts) * cast(FlyLoRA, e.method).scale(site) / self.scale(site) for e in experts]
        tensors["B"].copy_(torch.cat([e.tensors["B"] * s for e, s in zip(experts, shares, strict=True)], 1))
        return 0.0

    def factors(self, tensors: Tensors, site: Site) -> tuple[Tensor, Tensor]:
        """Return A with its zeros, and B."""
        values = tensors["values"]
        a = values.new_zeros(len(values), site.in_features).scatter_(1, tensors["positions"].long(), values)
        return a, tensors["B"]

    def scale(self, site: Site) -> float:
        """Return alpha/rank."""
        return 2.0 if self.alpha is None else self.alpha / self.rank

    @property
    def constant(self) -> bool:
        """Whether every unit fires for every token."""
        return self.top_k == self.rank or self.select == "all"

    @property
    def plain(self) -> bool:
        """Whether the update is ``scale · B A`` in the gradient too."""
        return self.constant and self.grad_to_input

    def mid(self, h: Tensor, call: Call, tensors: Tensors) -> Tensor:
        """Keep the chosen units."""
        if not self.grad_to_input:
            h = h.detach()
        if self.constant:
            return h
        score = precise(h.detach()) + tensors["bias"]
        score = score.unflatten(-1, (self.tasks, self.rank))
        mask = top_k_mask(score.abs() if self.select == "magnitude" else score, self.top_k).flatten(-2)
        if call.training and self.rate:
            call.record("counts", lambda: counts(mask, call.of_tokens(call.context.padding_mask)), always=True)
        report(call, mask)
        return h.masked_fill(~mask, 0)

    def after_step(self, tensors: Tensors, site: Site, record: Mapping[str, Tensor]) -> None:
        """Move the bias against the loads of the step."""
        if "counts" in record:
            balance_step(tensors["bias"], record["counts"], self.rate)
