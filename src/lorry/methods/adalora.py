"""AdaLoRA: an update in the form of a singular value decomposition whose rank budget moves to where it
matters.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lorry.core.errors import OptionError
from lorry.core.method.families import Bottleneck, check_rank
from lorry.core.method.registry import register
from lorry.core.method.spec import Places, Tensors, TensorSpec, normal
from lorry.core.options import option
from lorry.core.sites.site import Site

TRAINED = ("A", "B", "E")


@register("adalora", paper="arXiv 2303.10512")
@dataclass(frozen=True)
class AdaLoRA(Bottleneck):
    """``ΔW = scale · B diag(E) A``; A and B are kept near orthonormal, and unimportant entries of E are set
    to zero during training.

    A triplet's importance is the smoothed sensitivity ``|w · ∂L/∂w|`` times its smoothed uncertainty, of E
    plus the means over A and B (equations 8 to 11). The budget falls from ``initial_rank`` to ``target_rank``
    for each site by a cubic (equation 12), and is spent on the most important triplets of all sites together.

    Use it where you do not know which layers need rank: the budget goes there by itself. Give it the length of the
    run, since the budget falls over the steps.
    """

    initial_rank: int = option(12, "Rank of every site at the start.", at_least=1)
    target_rank: int = option(8, "Mean rank of the sites at the end.", at_least=1)
    alpha: float | None = option(
        None, "Numerator of the scale alpha/initial_rank; that rank itself if not given.", above=0
    )
    warmup: int = option(0, "Steps before the budget begins to fall.", at_least=0)
    final: int = option(0, "Last steps, in which the ranks stay as they are.", at_least=0)
    interval: int = option(1, "Steps from one allocation to the next.", at_least=1)
    beta1: float = option(0.85, "Smoothing of the sensitivity.", above=0, below=1)
    beta2: float = option(0.85, "Smoothing of the uncertainty.", above=0, below=1)
    orthogonality: float = option(0.5, "Weight of the penalty on A Aᵀ - I and Bᵀ B - I.", at_least=0)
    penalty_form: str = option(
        "mean-norm",
        "The released code's mean of Frobenius norms, or the paper's sum of their squares.",
        choices=("mean-norm", "sum-square"),
    )
    dropout: float = option(0.0, "Fraction of the update's input that is dropped in training.", at_least=0, below=1)

    def check(self) -> None:
        """Refuse a budget that would rise."""
        if self.target_rank > self.initial_rank:
            raise OptionError(
                f"AdaLoRA: target_rank must be at most initial_rank {self.initial_rank}, found {self.target_rank}."
            )

    def check_site(self, site: Site) -> None:
        """Refuse a rank above the width of the layer."""
        check_rank(site, self.initial_rank, "initial_rank")

    def tensors(self, site: Site) -> dict[str, TensorSpec]:
        """Return A, B and E, their smoothed statistics, and which triplets are kept."""
        rank = self.stored
        trained = {
            "A": TensorSpec((*site.lead, rank, site.in_features), normal(0.02)),
            "B": TensorSpec((*site.lead, site.out_features, rank), normal(0.02)),
            "E": TensorSpec((*site.lead, rank)),
        }
        state = {
            f"{kind}_{n}": TensorSpec(s.shape, trained=False)
            for n, s in trained.items()
            for kind in ("sensitivity", "uncertainty")
        }
        kept = TensorSpec(
            (*site.lead, rank), lambda tensor, generator: tensor.fill_(True), trained=False, dtype=torch.bool
        )
        return {**trained, **state, "kept": kept}

    def factors(self, tensors: Tensors, site: Site) -> tuple[Tensor, Tensor]:
        """Return ``diag(E) A`` and B."""
        return tensors["E"].unsqueeze(-1) * tensors["A"], tensors["B"]

    def scale(self, site: Site) -> float:
        """Return alpha over the stored rank; it stays when ranks change."""
        return 1.0 if self.alpha is None else self.alpha / self.stored

    @property
    def stored(self) -> int:
        """The number of triplets that are stored, which divides alpha."""
        return self.initial_rank

    @property
    def alpha_rank(self) -> int:
        """The number of triplets that are stored."""
        return self.stored

    def penalty(self, places: Places) -> Tensor | None:
        """Return how far A and B are from orthonormal."""
        if not self.orthogonality or not places:
            return None
        eye = torch.eye(self.stored)
        gaps = [
            g for _, t in places for g in (t["A"] @ t["A"].mT - eye.to(t["A"]), t["B"].mT @ t["B"] - eye.to(t["B"]))
        ]
        if self.penalty_form == "sum-square":
            return self.orthogonality * torch.stack([g.square().sum() for g in gaps]).sum()
        return self.orthogonality * torch.stack([torch.linalg.matrix_norm(g).mean() for g in gaps]).mean()

    def budget(self, step: int, total: int, sites: int) -> int:
        """Return how many triplets of `sites` matrices are kept after `step` (equation 12)."""
        most, least = self.initial_rank * sites, self.target_rank * sites
        left = min(max((total - self.final - step) / max(total - self.final - self.warmup, 1), 0.0), 1.0)
        return int((most - least) * left**3 + least)

    def adjust(self, places: Places, step: int, total: int) -> None:
        """Follow the importance of every triplet and keep as many as the budget allows."""
        last = max(total - self.final, 1)
        if step < last:
            for _, tensors in places:
                self._follow(tensors)
        due = step > self.warmup and step % self.interval == 0 and step < last
        if due or step == last:
            scores = torch.cat([importance(t).flatten() for _, t in places])
            budget = self.budget(step, total, len(scores) // self.initial_rank)
            order = scores.sort(descending=True, stable=True).indices
            chosen = torch.zeros_like(scores, dtype=torch.bool).index_fill(0, order[:budget], True)
            for (_, tensors), part in zip(places, chosen.split([t["E"].numel() for _, t in places]), strict=True):
                tensors["kept"].copy_(part.view_as(tensors["kept"]))
        if due or step >= last:
            for _, tensors in places:
                tensors["E"].mul_(tensors["kept"])

    def _follow(self, tensors: Tensors) -> None:
        for name in TRAINED:
            gradient = tensors[name].grad
            if gradient is None:
                continue
            now = (tensors[name] * gradient).abs()
            mean, spread = tensors[f"sensitivity_{name}"], tensors[f"uncertainty_{name}"]
            mean.lerp_(now.to(mean.dtype), 1 - self.beta1)
            spread.lerp_((now - mean).abs().to(spread.dtype), 1 - self.beta2)


def importance(tensors: Tensors) -> Tensor:
    """Return the importance of each triplet, ``(*lead, rank)``."""
    a, b, e = (tensors[f"sensitivity_{n}"] * tensors[f"uncertainty_{n}"] for n in TRAINED)
    return e + a.mean(-1) + b.mean(-2)
