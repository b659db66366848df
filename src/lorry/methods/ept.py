"""EPT: experts of different granularity, made from one small shared matrix by transposed convolutions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from lorry.core.errors import OptionError
from lorry.core.method.call import Call
from lorry.core.method.families import Bottleneck
from lorry.core.method.registry import register
from lorry.core.method.spec import Layout, Tensors, TensorSpec, normal
from lorry.core.options import option
from lorry.core.sites.site import Site
from lorry.methods.parts import kronecker
from lorry.methods.parts.routing import precise, report, top_k_mask
from lorry.methods.parts.tasks import leave_contrast, task_rows


@register("ept", paper="arXiv 2603.12577", kinds=lambda kind: kind.plain_product)
@dataclass(frozen=True)
class EPT(Bottleneck):
    """``ΔW x = Σ_{e in top k} G(x)_e c_e (Z_e ⊗ K_e) x``, ``Z_e = B[:out/s] A[:, :in/s]`` for a kernel K_e of size s.

    A transposed convolution whose stride is its kernel size is this Kronecker product, so the experts are applied
    without being built. Kernels start at zero, A and B do not. ``c_e`` is ``s/tasks`` (the literal reading of the
    sources), ``s/s_max`` or 1. How tasks enter the gate is not in the sources: it reads the token (default), the token
    and its row's task embedding, or the task alone. A task gate with `serve_task` is one matrix and fuses exactly; the
    published claim of fusing holds for that case alone. Rows with task_ids (`lorry.context`) leave a contrastive loss
    between task embeddings and the mean-pooled input of the last adapted layer that is as wide as they are.

    Use it for several tasks at once that ask for updates of different granularity; with one task, LoRA is simpler.
    """

    rank: int = option(8, "Rank of the shared seed.", at_least=1)
    kernels: tuple[int, ...] = option((2, 2, 4, 4, 6, 6, 8, 8), "Kernel size of each expert.")
    top_k: int = option(2, "Experts that are active for a token.", at_least=1)
    tasks: int = option(8, "Number of tasks.", at_least=1)
    temperature: float = option(0.05, "Of the router's softmax.", above=0)
    renormalize_topk: bool = option(False, "Let the kept weights sum to 1.")
    freq_scale: str = option("s/T", "Factor of an expert.", choices=("s/T", "s/s_max", "none"))
    gate: str = option("token", "What the gate reads.", choices=("token", "token+task", "task"))
    serve_task: int | None = option(None, "Task whose gate applies to every row.", at_least=0)
    contrastive: float = option(0.1, "Weight of the contrastive loss.", at_least=0)
    contrastive_temperature: float = option(0.05, "Of its similarities.", above=0)
    init_std: float = option(0.02, "Of A and B at the start; at 0 nothing could be trained.", above=0)
    router_std: float = option(1e-3, "Of the router; the temperature multiplies it.", at_least=0)
    dropout: float = option(0.0, "Dropped fraction of the input in training.", at_least=0, below=1)

    def check(self) -> None:
        """Refuse kernels below 1, more active experts than there are, and a task that does not exist."""
        if not self.kernels or min(self.kernels) < 1 or self.top_k > len(self.kernels):
            raise OptionError(
                "EPT: kernels must be sizes of at least 1 and top_k at most their number, found "
                f"kernels={self.kernels} and top_k={self.top_k}."
            )
        if self.serve_task is not None and (self.serve_task >= self.tasks or self.gate == "token"):
            raise OptionError(
                "EPT: serve_task must be below tasks and needs a gate that reads the task, found "
                f"serve_task={self.serve_task}, tasks={self.tasks}, gate={self.gate!r}."
            )

    def tensors(self, site: Site) -> dict[str, TensorSpec]:
        """Return A ``(rank, in/s_min)``, B ``(out/s_min, rank)``, the kernels ``(s, s)``, and the router."""
        least = min(self.kernels)
        rows, columns = math.ceil(site.out_features / least), math.ceil(site.in_features / least)
        specs = {"A": TensorSpec((self.rank, columns), normal(self.init_std))}
        specs["B"] = TensorSpec((rows, self.rank), normal(self.init_std))
        specs |= {f"kernel_{e}": TensorSpec((size, size)) for e, size in enumerate(self.kernels)}
        return {**specs, "router": TensorSpec((len(self.kernels), site.in_features), normal(self.router_std))}

    def layout(self, sites: Sequence[Site]) -> Layout:
        """Return the tensors of all sites, and the task embeddings they share, as wide as the first's input."""
        layout = super().layout(sites)
        if self.contrastive or self.gate != "token":
            width = sites[0].in_features
            layout.shared["tasks"] = TensorSpec((self.tasks, width), normal(1 / math.sqrt(width)))
            for site in sites:
                own, experts = layout.sites[site.path], len(self.kernels)
                if self.gate == "task":
                    own["router"] = TensorSpec((experts, width), normal(self.router_std))
                elif self.gate == "token+task":
                    own["task_router"] = TensorSpec((experts, width), normal(self.router_std))
        return layout

    @property
    def constant(self) -> bool:
        """Whether the gate is the same for every token."""
        return self.gate == "task" and self.serve_task is not None

    @property
    def scales(self) -> list[float]:
        """Factor of each expert."""
        whole = {"s/T": self.tasks, "s/s_max": max(self.kernels), "none": None}[self.freq_scale]
        return [1.0 if whole is None else size / whole for size in self.kernels]

    @property
    def plain(self) -> bool:
        """Whether the update is one matrix and there is no loss to leave."""
        return self.constant and not self.contrastive

    @property
    def by_size(self) -> dict[int, list[int]]:
        """The experts of each kernel size, ascending."""
        return {size: [e for e, s in enumerate(self.kernels) if s == size] for size in sorted(set(self.kernels))}

    def factors(self, tensors: Tensors, site: Site) -> tuple[Tensor, Tensor]:
        """Return ``A_s ⊗ I`` and ``B_s ⊗ I`` of all sizes, with a constant gate ``B_s ⊗ K̄_s``, K̄ the mixed kernel."""
        mixed = None
        if self.constant:
            logits = precise(F.linear(tensors["tasks"][self.serve_task], tensors["router"]))
            weights = (self._weigh(logits) * logits.new_tensor(self.scales)).unbind()
            weighed = [weight * tensors[f"kernel_{e}"] for e, weight in enumerate(weights)]
            mixed = [torch.stack([weighed[e] for e in chosen]).sum(0) for chosen in self.by_size.values()]
        return kronecker.factors(tensors["A"], tensors["B"], site, list(self.by_size), mixed)

    def mid(self, h: Tensor, call: Call, tensors: Tensors) -> Tensor:
        """Send the units of each size through the chosen kernels."""
        if self.contrastive and call.training:
            leave_contrast(call, tensors["tasks"], self.contrastive, self.contrastive_temperature)
        if self.constant:
            return h
        gates = self._gates(call, tensors)
        weights = (gates * gates.new_tensor(self.scales)).to(h.dtype).unbind(-1)
        parts = h.split([self.rank * size for size in self.by_size], -1)
        mixed = []
        for units, chosen in zip(parts, self.by_size.values(), strict=True):
            own = torch.stack([weights[e] for e in chosen], -1)
            mixed.append(kronecker.through_kernels(units, own, [tensors[f"kernel_{e}"] for e in chosen]))
        return torch.cat(mixed, -1)

    def expert(self, tensors: Tensors, site: Site, e: int) -> Tensor:
        """Return the weight of one expert, ``(out, in)``."""
        return kronecker.product(tensors["A"], tensors["B"], tensors[f"kernel_{e}"], site)

    def _weigh(self, logits: Tensor) -> Tensor:
        p = (logits / self.temperature).softmax(-1)
        p = p * top_k_mask(p.detach(), self.top_k)
        return p / p.sum(-1, keepdim=True) if self.renormalize_topk else p

    def _gates(self, call: Call, tensors: Tensors) -> Tensor:
        """Return the gates ``(..., experts)`` of each token."""
        shape = call.x.shape[:-1]
        logits = call.project(tensors["router"]) if self.gate != "task" else torch.zeros((), device=call.x.device)
        if self.gate != "token":
            served = None if self.serve_task is None else tensors["tasks"][self.serve_task].unsqueeze(0)
            tasks = task_rows(call, tensors["tasks"]) if served is None else served
            own = precise(F.linear(tasks, tensors["router" if self.gate == "task" else "task_router"]))
            logits = logits + own.reshape(len(own), *[1] * (len(shape) - 1), -1)
        gates = self._weigh(logits.expand(*shape, -1))
        report(call, gates, gates)
        return gates
