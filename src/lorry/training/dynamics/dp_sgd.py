"""DP-SGD: each example's gradient is clipped, then noise is added (Abadi et al. 2016, arXiv 1607.00133)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lorry.core.errors import OptionError
from lorry.core.options import option
from lorry.training.hooks import Dynamic, Moment, register_dynamic


@register_dynamic("dp-sgd")
@dataclass(frozen=True)
class DPSGD(Dynamic):
    """The gradient is ``(sum over examples of g · min(1, C / |g|) + N(0, (sigma · C)² I)) / examples``.

    g is the gradient of an example's mean loss (over its own predictions, so that no example weighs in another's) with
    respect to all trained tensors together, and nothing else: what is frozen has no part in its norm. An example of
    several rows (a preference pair) counts as one. Each trained tensor must be a low-rank factor, or what factors are
    made of, at linear layers without dropout; see `lorry.training.row_gradients`.

    The noise comes from the job's seed, so that a resumed run is the same; keep the seed secret. What epsilon it gives
    is the business of an accountant (Opacus), which must be told how examples are drawn: here, epochs in random order.
    """

    row_gradients: ClassVar[bool] = True
    neutral: ClassVar = {"max_norm": None, "noise": 0.0}
    apart: ClassVar = {
        "allora": "it would scale gradients that are thrown away for the clipped ones",
        "gradient-noise": "the noise of DP-SGD is calibrated; raise its own instead",
    }

    max_norm: float | None = option(1.0, "C, the largest norm of an example's gradient; None does not clip.", above=0)
    noise: float = option(1.0, "sigma, the noise's standard deviation in units of C.", at_least=0)

    def check(self) -> None:
        """Refuse noise without a bound."""
        if self.max_norm is None and self.noise:
            raise OptionError(
                f"DP-SGD: noise is measured in units of max_norm, which is None while noise is {self.noise}; set "
                "max_norm, or noise to 0."
            )

    def after_pass(self, at: Moment, rows: Mapping[str, Tensor]) -> None:
        """Clip the gradient of each example of the micro-batch, and add them up."""
        if self.max_norm is None:
            return
        trained = at.groups.parameters()
        examples = torch.repeat_interleave(torch.arange(len(at.heights)), torch.tensor(at.heights))
        counts = torch.tensor(at.counts, dtype=torch.float64).clamp_min(1)
        found = {}
        for name, each in rows.items():  # a layer that the pass left out has none
            parameter = trained[name]
            summed = each.new_zeros(len(at.heights), *parameter.shape).index_add_(0, examples.to(each.device), each)
            found[name] = summed / (counts.to(summed) * at.weight).view(-1, *[1] * parameter.dim())
        squares = torch.stack([g.flatten(1).square().sum(1) for g in found.values()]).sum(0)
        factors = (self.max_norm / squares.sqrt().clamp_min(1e-30)).clamp_max(1.0)
        for name, each in found.items():
            clipped = torch.einsum("n,n...->...", factors, each)
            at.state[name] = at.state[name].to(clipped) + clipped if name in at.state else clipped
        seen = torch.tensor(float(len(at.heights)))
        at.state["examples"] = at.state["examples"] + seen if "examples" in at.state else seen

    def before_step(self, at: Moment) -> None:
        """Put the noisy mean in the place of the gradient."""
        if self.max_norm is None:
            return
        examples = float(at.state.pop("examples"))
        for name, parameter in at.groups.parameters().items():
            total = at.state.pop(name, torch.zeros_like(parameter)).to(parameter)
            if self.noise:
                drawn = torch.randn(parameter.shape, generator=at.generator(name))
                total = total + drawn.to(total) * (self.noise * self.max_norm)
            parameter.grad = total / examples
