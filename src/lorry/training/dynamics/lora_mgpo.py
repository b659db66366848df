"""LoRA-MGPO: a pass at a point moved along the optimizer's momentum (arXiv 2502.14538 v2 and v3). Experimental."""

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


@register_dynamic("lora-mgpo")
@dataclass(frozen=True)
class LoRAMGPO(Dynamic):
    """Takes the gradient at ``P + rho · phi · m / |m|`` and steps from P, for each trained tensor P.

    m is the optimizer's first moment of P, and phi the norm of P's gradient in the step before over its running mean,
    between 0.1 and 10. The paper's abstract says this much and no more, so the formula is an inference.
    """

    neutral: ClassVar = {"rho": 0.0}
    apart: ClassVar = {"lora-ggpo": "they are two ways of one perturbation"}

    rho: float = option(0.05, "How far the point moves.", at_least=0)
    smoothing: float = option(
        0.9, "What stays of the mean of gradient norms from one step to the next.", at_least=0, below=1
    )

    def begin(self, at: Moment) -> None:
        """Refuse an optimizer without a first moment."""
        known = at.groups.optimizer.defaults
        if self.rho and "betas" not in known and not known.get("momentum"):
            raise OptionError(
                f"LoRA-MGPO moves along the optimizer's momentum, and {type(at.groups.optimizer).__name__} has none; "
                "use adamw, or sgd with momentum."
            )

    def around_pass(self, at: Moment) -> AbstractContextManager[Any]:
        """Move, and go back."""
        return self._moved(at) if self.rho else nullcontext()

    @contextmanager
    def _moved(self, at: Moment) -> Iterator[None]:
        before = {}
        with torch.no_grad():
            for name, p in at.groups.parameters().items():
                moment = _momentum(at.groups.optimizer.state.get(p, {}))
                size = None if moment is None else moment.norm()
                if moment is not None and size:
                    factor = self.rho / size
                    if name in at.state:
                        now, mean = at.state[name]
                        factor = factor * (now / mean.clamp_min(1e-30)).clamp(0.1, 10)
                    before[name] = p.detach().clone()
                    p.add_(moment * factor)
        try:
            yield
        finally:
            with torch.no_grad():
                for name, value in before.items():
                    at.groups.parameters()[name].copy_(value)

    def after_clipping(self, at: Moment) -> None:
        """Remember the norms of gradients, and their running means."""
        if not self.rho:
            return
        for name, gradient in at.groups.gradients().items():
            now = gradient.norm()
            mean = at.state[name][1] if name in at.state else now
            at.state[name] = torch.stack([now, mean * self.smoothing + now * (1 - self.smoothing)])


def _momentum(state: Any) -> Tensor | None:
    found = state.get("exp_avg", state.get("momentum_buffer"))
    return found if isinstance(found, Tensor) else None
