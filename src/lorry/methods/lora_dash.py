"""LoRA-Dash: after a while, the directions of the weight that change most get a coefficient of their own."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from lorry.core.errors import SiteError
from lorry.core.method.registry import register
from lorry.core.method.spec import Places, Tensors, TensorSpec
from lorry.core.options import option
from lorry.core.sites.site import Site
from lorry.methods.lora import LoRA
from lorry.methods.parts.decompose import truncated_svd


@register("lora-dash", paper="arXiv 2409.01035")
@dataclass(frozen=True)
class LoRADash(LoRA):
    """``ΔW = scale · B A + Σ_i δ_i u_i v_iᵀ`` with k singular directions of W, whose coefficients δ are trained from
    step `launch` on (section 4.2).

    The directions are those with the largest ``|u_iᵀ ΔW v_i| / σ_i`` after `launch` steps of LoRA: the ones that the
    task moves most for what they weigh. Until then δ is held at zero after each step. The directions are written to
    the checkpoint.

    Use it in LoRA's place at small ranks in runs that are several times as long as the launch.
    """

    directions: int = option(8, "Number k of directions; at most the narrower side of a layer.", at_least=1)
    launch: int = option(100, "Step after which the directions are chosen.", at_least=1)

    def tensors(self, site: Site) -> dict[str, TensorSpec]:
        """Return A, B, the directions and their coefficients."""
        k = min(self.directions, site.out_features, site.in_features)
        return {
            **super().tensors(site),
            "right": TensorSpec((*site.lead, k, site.in_features), trained=False),
            "left": TensorSpec((*site.lead, site.out_features, k), trained=False),
            "dash": TensorSpec((*site.lead, k)),
        }

    def setup(self, tensors: dict[str, Tensor], site: Site, generator: Generator) -> None:
        """Take the top directions until they are chosen."""
        u, _, vt = truncated_svd(site.matrix().float(), tensors["dash"].shape[-1], 0, generator)
        tensors["left"].copy_(u)
        tensors["right"].copy_(vt)

    def factors(self, tensors: Tensors, site: Site) -> tuple[Tensor, Tensor]:
        """Return both parts side by side; the coefficients are not scaled."""
        a, b, dash = tensors["A"], tensors["B"], tensors["dash"] / self.scale(site)
        left = tensors["left"].to(b) * dash.unsqueeze(-2)
        return torch.cat([a, tensors["right"].to(a)], -2), torch.cat([b, left], -1)

    def adjust(self, places: Places, step: int, total: int) -> None:
        """Hold the coefficients at zero before the launch, and choose the directions at it."""
        if step > self.launch:
            return
        for site, tensors in places:
            tensors["dash"].zero_()
            if step == self.launch:
                self._choose(site, tensors)

    def _choose(self, site: Site, tensors: Tensors) -> None:
        u, s, vt = torch.linalg.svd(site.matrix().float(), full_matrices=False)
        if not bool(s.isfinite().all()):
            raise SiteError(f"The weight of '{site.path}' has no finite singular values, so it has no directions.")
        a, b = tensors["A"].to(s), tensors["B"].to(s)
        change = ((u.mT @ b) * (vt @ a.mT)).sum(-1).abs() / s.clamp_min(torch.finfo(s.dtype).tiny)
        chosen = change.topk(tensors["dash"].shape[-1], dim=-1).indices
        tensors["left"].copy_(u.gather(-1, chosen.unsqueeze(-2).expand_as(tensors["left"])))
        tensors["right"].copy_(vt.gather(-2, chosen.unsqueeze(-1).expand_as(tensors["right"])))
