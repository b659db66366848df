"""GaLore: Adam in a subspace of each gradient (Zhao et al. 2024, arXiv 2403.03507)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from lorry.core.errors import OptionError
from lorry.core.options import option
from lorry.training.hooks import Dynamic, Moment, register_dynamic

_STEPS = "it takes the optimizer's step for these tensors itself"


@register_dynamic("galore")
@dataclass(frozen=True)
class GaLore(Dynamic):
    """Takes Adam's step for large matrices in ``rank`` directions of their gradient, and back: memory of the moments
    is ``rank · n`` in place of ``m · n``.

    The directions are the gradient's first singular vectors on its shorter side, found anew every so many steps, with
    signs that follow the ones before; moments stay, as in the authors' code (algorithm 2). Betas, epsilon, decay and
    rate are those of the job's optimizer, which must be Adam or AdamW and does not see these tensors. It is meant for
    whole weights (modules_to_save); tensors that are no larger than the rank are left alone.
    """

    neutral: ClassVar = {"rank": 0}
    apart: ClassVar = {name: _STEPS for name in ("allora", "lora-mgpo", "relora", "plora", "delta-lora")}

    rank: int = option(128, "Directions; 0 projects nothing.", at_least=0)
    every: int = option(200, "Steps between new directions.", at_least=1)
    scale: float = option(0.25, "Factor of the step.", above=0)
    tensors: str = option("*", "Shell pattern on PATH.TENSOR.")

    def chosen(self, at: Moment) -> dict[str, torch.nn.Parameter]:
        """Return the matrices that are larger than the rank."""
        names = at.groups.names(self.tensors)
        known = at.groups.parameters()
        return {n: known[n] for n in names if known[n].dim() == 2 and min(known[n].shape) > self.rank}

    def begin(self, at: Moment) -> None:
        """Look whether there is something to do, and an optimizer to do it after."""
        if not self.rank:
            return
        optimizer = type(at.groups.optimizer).__name__
        if optimizer not in ("Adam", "AdamW"):
            raise OptionError(f"GaLore takes the steps of adam or adamw in a subspace; the optimizer is {optimizer}.")
        if not self.chosen(at):
            raise OptionError(
                f"GaLore: adapter '{at.adapter.name}' trains no matrix under '{self.tensors}' with both sides above "
                f"rank={self.rank}. Lower the rank, or train whole weights (modules_to_save)."
            )

    def after_clipping(self, at: Moment) -> None:
        """Take the step, and take the gradient from the optimizer."""
        if not self.rank:
            return
        for name, parameter in self.chosen(at).items():
            gradient = parameter.grad
            if gradient is not None:
                self._step(at, name, parameter, gradient)
                parameter.grad = None

    def _step(self, at: Moment, name: str, parameter: Tensor, gradient: Tensor) -> None:
        group = next(g for g in at.groups.optimizer.param_groups if any(p is parameter for p in g["params"]))
        tall = gradient.shape[0] >= gradient.shape[1]
        flat = gradient.mT if tall else gradient  # (short side, long side)
        count = int(at.state.get(f"{name}/step", torch.tensor(0)))
        if count % self.every == 0:
            at.state[f"{name}/directions"] = directions(flat, self.rank, at.state.get(f"{name}/directions"))
        basis = at.state[f"{name}/directions"].to(flat.device)
        small = basis.mT @ flat
        decay = group["lr"] * group["weight_decay"]
        decoupled = group.get("decoupled_weight_decay", True)
        if decay and not decoupled:
            raise OptionError("GaLore decays weights as adamw does; use optimizer adamw, or weight_decay 0.")
        back = basis @ self._adam(at.state, name, small, group, count + 1)
        parameter.mul_(1 - decay)
        parameter.add_(back.mT if tall else back, alpha=-group["lr"] * self.scale)

    def _adam(self, state: dict[str, Tensor], name: str, small: Tensor, group: Mapping[str, Any], count: int) -> Tensor:
        """Return Adam's step of a projected gradient, without the rate."""
        first, second = group["betas"]
        keys = (f"{name}/exp_avg", f"{name}/exp_avg_sq")
        m, v = (state[key].to(small) if key in state else torch.zeros_like(small) for key in keys)
        m, v = m.lerp(small, 1 - first), v * second + small.square() * (1 - second)
        state[keys[0]], state[keys[1]], state[f"{name}/step"] = m, v, torch.tensor(count)
        return (m / (1 - first**count)) / ((v / (1 - second**count)).sqrt() + group["eps"])


def directions(flat: Tensor, rank: int, before: Tensor | None) -> Tensor:
    """Return the first left singular vectors of a gradient, with the signs that fit those before best."""
    u = (
        torch.linalg.svd(flat.float(), full_matrices=False)[0][:, :rank].to(flat).contiguous()
    )  # laid out as a checkpoint gives it back
    if before is None:
        return u
    return u * torch.where((u * before.to(u)).sum(0) < 0, -1.0, 1.0).to(u)
