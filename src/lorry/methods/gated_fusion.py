"""AutoLoRA's gated fusion: several adapters at once, each through a gate for every channel of every token."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import layer_norm

from lorry.core.errors import OptionError
from lorry.core.method.call import Call
from lorry.core.method.families import Combiner, check_rank
from lorry.core.method.registry import preset, register
from lorry.core.method.spec import Tensors, TensorSpec, constant, kaiming, normal, ones
from lorry.core.options import option
from lorry.core.sites.site import Site

_GATES = ("none", "scalar", "no-cross", "cross")
_STARTS = ("released", "small")
_EPS = 1e-5


@register("gated-fusion", paper="arXiv 2508.02107", kinds=lambda kind: kind.additive, identity_at_start=False)
@dataclass(frozen=True)
class GatedFusion(Combiner):
    """``y = y0 + Σ_t w_out ⊙ g_t ⊙ u_t`` over the updates u_t of other adapters, with the gates
    ``g_t = σ(LN(y0) ⊙ w_base + LN(u_t) ⊙ w_update + LN(y0) ⊙ LN(u_t) ⊙ w_cross + bias)``.

    The gate's tensors are those of the layer and shared by all adapters, 9 values for each channel of its output, so
    that a gate that was trained with three adapters serves any number, also of such that it never saw. Which
    adapters are combined is the option ``over``, or said for a pass by
    ``lorry.context(model, combined={"gate": [...]})``; see `lorry.core.method.families.Combiner`. What is combined
    should be frozen. With `rank` the layer has a LoRA of the gate's own beside them, always on and trained with it.

    ``gate``: "cross" is the above; "no-cross" leaves out the product of both norms; "scalar" has one number for each
    token and adapter, the sum of the channels' logits over √channels; "none" leaves ``w_out`` alone. ``start``:
    "released" draws weights and biases from N(0, 1), so that channels pass or block at random before training;
    "small" draws weights from N(0, 0.01) and lets biases be zero, so that gates begin about half open.

    Use it to run several adapters at once where their sum spoils what each can.
    """

    over: tuple[str, ...] = option((), "Adapters that are combined where a pass does not say others.")
    gate: str = option("cross", "What the gate is made of.", choices=_GATES)
    start: str = option("small", "How gates begin.", choices=_STARTS)
    rank: int = option(0, "Rank of a LoRA of the gate's own; 0 for none.", at_least=0)

    def check(self) -> None:
        """Refuse a member twice."""
        if len(set(self.over)) != len(self.over):
            raise OptionError(f"GatedFusion: over must name each adapter once, found {list(self.over)}.")

    @property
    def members(self) -> tuple[str, ...]:
        """The adapters that are combined unless a pass says others."""
        return self.over

    def check_site(self, site: Site) -> None:
        """Refuse a LoRA of the gate's own that is wider than the layer, beside what all combiners refuse."""
        super().check_site(site)
        if self.rank:
            check_rank(site, self.rank)

    def tensors(self, site: Site) -> dict[str, TensorSpec]:
        """Return the gate's vectors ``(out,)``, and A ``(rank, in)``, B ``(out, rank)`` of its own LoRA."""
        width = (site.out_features,)
        std, shift = (1.0, normal()) if self.start == "released" else (0.1, constant(0.0))
        specs = {"w_out": TensorSpec(width, ones)}
        if self.gate != "none":
            specs |= {name: TensorSpec(width, normal(std)) for name in ("w_base", "w_update")}
            specs |= {"bias": TensorSpec(width, shift)}
            for name in ("norm_base", "norm_update"):
                specs |= {f"{name}.weight": TensorSpec(width, ones), f"{name}.bias": TensorSpec(width)}
        if self.gate in ("scalar", "cross"):
            specs["w_cross"] = TensorSpec(width, normal(std))
        if self.rank:
            specs["A"] = TensorSpec((self.rank, site.in_features), kaiming)
            specs["B"] = TensorSpec((site.out_features, self.rank))
        return specs

    def combine(self, call: Call, updates: Mapping[str, Tensor], tensors: Tensors) -> Tensor:
        """Return the sum of the gated updates, in the layer's output layout."""
        site, kind, dtype = call.site, call.site.kind, call.output.dtype
        own = {name: tensor.to(dtype) for name, tensor in tensors.items()}
        found = [kind.channels_last(site, update) for update in updates.values()]
        if self.rank:
            x = call.x.to(dtype) if call.x.is_floating_point() else call.x
            found.append(kind.channels_last(site, kind.up(site, kind.down(site, x, own["A"]), own["B"])))
        base = kind.channels_last(site, call.output)
        # one more dimension in front; norms are over the channels of one token of one adapter
        stacked = torch.stack(found) if found else base.new_zeros(0, *base.shape)
        gated = stacked if self.gate == "none" else self.gates(base, stacked, own) * stacked
        return kind.channels_back(site, own["w_out"] * gated.sum(0))

    def gates(self, base: Tensor, updates: Tensor, own: Tensors) -> Tensor:
        """Return the gates between 0 and 1.

        Parameters
        ----------
        base
            The layer's own output ``(..., out)``.
        updates
            Those of the adapters, ``(adapters, ..., out)``.
        own
            The gate's tensors.

        Returns
        -------
        Tensor
            ``(adapters, ..., out)``, or ``(adapters, ..., 1)`` for "scalar".
        """
        width = base.shape[-1:]
        y = layer_norm(base, width, own["norm_base.weight"], own["norm_base.bias"], _EPS)
        u = layer_norm(updates, width, own["norm_update.weight"], own["norm_update.bias"], _EPS)
        logits = y * own["w_base"] + u * own["w_update"] + own["bias"]
        if self.gate != "no-cross":
            logits = logits + y * u * own["w_cross"]
        if self.gate == "scalar":
            logits = logits.sum(-1, keepdim=True) / logits.shape[-1] ** 0.5
        return logits.sigmoid()


preset("gated-fusion-released", of="gated-fusion", paper="modelscope/DiffSynth-Studio", start="released")
