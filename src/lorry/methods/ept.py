"""EPT: experts of different granularity, made from one small shared matrix by transposed convolutions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from lorry.core.call import Call
from lorry.core.errors import AdapterError, OptionError
from lorry.core.families import WeightDelta
from lorry.core.method import Layout, MergeClass, Tensors, TensorSpec, normal, register
from lorry.core.options import option
from lorry.core.routing import precise, report, top_k_mask
from lorry.core.sites import Site


@register("ept", paper="arXiv 2603.12577", kinds=("linear",), merge="never")
@dataclass(frozen=True)
class EPT(WeightDelta):
    """``ΔW x = Σ_{e in top k} G(x)_e c_e (Z_e ⊗ K_e) x``, with ``Z_e = B[:out/s] A[:, :in/s]`` for a kernel
    K_e of size s.

    A transposed convolution whose stride is its kernel size is this Kronecker product, so the experts are
    applied without being built. Kernels start at zero, A and B do not. ``c_e`` is ``s/tasks`` (the literal
    reading of the sources), ``s/s_max`` or 1. How tasks enter the gate is not in the sources: it reads the
    token (default), the token and its row's task embedding, or the task alone. A task gate with `serve_task`
    is one matrix and merges exactly; the published claim of merging holds for that case alone. Rows with
    task_ids (`lorry.context`) leave a contrastive loss between task embeddings and the mean-pooled input of
    the last adapted layer that is as wide as they are.
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
                f"EPT: kernels must be sizes of at least 1 and top_k at most their number, found "
                f"kernels={self.kernels} and "
                f"top_k={self.top_k}."
            )
        if self.serve_task is not None and (self.serve_task >= self.tasks or self.gate == "token"):
            raise OptionError(
                f"EPT: serve_task must be below tasks and needs a gate that reads the task, found "
                f"serve_task={self.serve_task}, "
                f"tasks={self.tasks}, gate={self.gate!r}."
            )

    def tensors(self, site: Site) -> dict[str, TensorSpec]:
        """Return A ``(rank, in/s_min)``, B ``(out/s_min, rank)``, a kernel ``(s, s)`` for each expert, and
        the router.
        """
        least = min(self.kernels)
        rows, columns = math.ceil(site.out_features / least), math.ceil(site.in_features / least)
        specs = {"A": TensorSpec((self.rank, columns), normal(self.init_std))}
        specs["B"] = TensorSpec((rows, self.rank), normal(self.init_std))
        specs |= {f"kernel_{e}": TensorSpec((size, size)) for e, size in enumerate(self.kernels)}
        return {**specs, "router": TensorSpec((len(self.kernels), site.in_features), normal(self.router_std))}

    def layout(self, sites: Sequence[Site]) -> Layout:
        """Return the tensors of all sites, and the task embeddings, as wide as the input of the first site,
        that they share.
        """
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
    def merging(self) -> MergeClass:
        """How the method merges with these options."""
        return "exact" if self.constant else "never"

    def factor(self, size: int) -> float:
        """Return the factor of an expert with this kernel size."""
        return {"s/T": size / self.tasks, "s/s_max": size / max(self.kernels), "none": 1.0}[self.freq_scale]

    def apply(self, call: Call, tensors: Tensors) -> Tensor:
        """Return the update of the layer's output."""
        dtype = call.output.dtype
        x = call.dropout(self.dropout).to(dtype)
        gates = self._gates(call, tensors)
        self._contrast(call, tensors)
        updates = []
        for size in sorted(set(self.kernels)):
            left, right = (f.to(dtype) for f in self._seed(tensors, call.site, size))
            missing = right.shape[1] * size - x.shape[-1]
            units = (F.pad(x, (0, missing)) if missing else x).unflatten(-1, (-1, size))
            # (..., columns, s) under A, then under this size's kernels mixed, then under B: (..., rows, s)
            units = right @ units
            chosen = [e for e, s in enumerate(self.kernels) if s == size]
            stack = torch.cat([tensors[f"kernel_{e}"] for e in chosen]).to(dtype)
            weights = (gates[..., chosen] * self.factor(size)).to(dtype)
            mixed = F.linear(units, stack).unflatten(-1, (len(chosen), size))
            units = (mixed * weights[..., None, :, None]).sum(-2)
            updates.append((left @ units).flatten(-2)[..., : call.site.out_features])
        return torch.stack(updates).sum(0)

    def delta(self, tensors: Tensors, site: Site) -> Tensor:
        """Return the update of the weight ``(out, in)`` for the task that is served."""
        if not self.constant:
            raise AdapterError(
                f"EPT has no weight update at '{site.path}': its gates depend on the token. With "
                "gate='task' and adapter.configure(serve_task=...) it is one matrix for a task."
            )
        weights = self._weigh(precise(F.linear(tensors["tasks"][self.serve_task], tensors["router"])))
        experts = [
            w * self.factor(size) * self.expert(tensors, site, e)
            for e, (size, w) in enumerate(zip(self.kernels, weights, strict=True))
        ]
        return torch.stack(experts).sum(0)

    def expert(self, tensors: Tensors, site: Site, e: int) -> Tensor:
        """Return the weight of one expert, ``(out, in)``."""
        left, right = self._seed(tensors, site, self.kernels[e])
        whole = torch.kron((left @ right).contiguous(), tensors[f"kernel_{e}"])
        return whole[: site.out_features, : site.in_features]

    def _seed(self, tensors: Tensors, site: Site, size: int) -> tuple[Tensor, Tensor]:
        """Return the rows of B and the columns of A that experts of this kernel size use."""
        rows, columns = math.ceil(site.out_features / size), math.ceil(site.in_features / size)
        return tensors["B"][:rows], tensors["A"][:, :columns]

    def _weigh(self, logits: Tensor) -> Tensor:
        p = (logits / self.temperature).softmax(-1)
        p = p * top_k_mask(p.detach(), self.top_k)
        return p / p.sum(-1, keepdim=True) if self.renormalize_topk else p

    def _gates(self, call: Call, tensors: Tensors) -> Tensor:
        """Return the gates ``(..., experts)`` of each token."""
        shape = call.x.shape[:-1]
        logits = call.project(tensors["router"]) if self.gate != "task" else torch.zeros((), device=call.x.device)
        if self.gate != "token":
            tasks = self._embeddings(call, tensors)
            own = precise(F.linear(tasks, tensors["router" if self.gate == "task" else "task_router"]))
            logits = logits + own.reshape(len(own), *[1] * (len(shape) - 1), -1)
        gates = self._weigh(logits.expand(*shape, -1))
        report(call, gates, gates)
        return gates

    def _embeddings(self, call: Call, tensors: Tensors) -> Tensor:
        """Return the task embedding of each row (one row for all if a task is served)."""
        if self.serve_task is not None:
            return tensors["tasks"][self.serve_task].unsqueeze(0)
        tasks = call.of_rows(call.context.task_ids)
        if tasks is None:
            raise AdapterError(
                f"The gate of adapter '{call.adapter}' reads the task: give task_ids in lorry.context, or "
                f"set serve_task. "
                "lorry.methods.ept.nearest_tasks guesses tasks from features."
            )
        return tensors["tasks"][tasks.long()]

    def _contrast(self, call: Call, tensors: Tensors) -> None:
        """Leave the contrastive loss of the rows' pooled inputs; the last layer as wide counts."""
        tasks = call.of_rows(call.context.task_ids)
        if not (self.contrastive and call.training) or tasks is None or call.x.shape[-1] != tensors["tasks"].shape[1]:
            return
        real = call.of_tokens(call.context.padding_mask)
        similarity = self.similarities(pooled(call.x, real), tensors["tasks"])
        call.add_loss("contrastive", self.contrastive * F.cross_entropy(similarity, tasks.long()), at="tasks")

    def similarities(self, features: Tensor, tasks: Tensor) -> Tensor:
        """Return cosine similarities over the temperature, ``(rows, tasks)``."""
        unit = F.normalize(features, dim=-1) @ F.normalize(tasks.to(features.dtype), dim=-1).mT
        return unit / self.contrastive_temperature


def pooled(x: Tensor, real: Tensor | None) -> Tensor:
    """Return the mean over the real tokens of each row, ``(rows, width)`` in float32."""
    if x.ndim == 2:
        return x.float()
    if real is None:
        return x.flatten(1, -2).mean(1, dtype=torch.float32)
    weight = real.to(x.dtype)
    total = torch.einsum("bl,bld->bd", weight, x).float()
    return total / weight.float().sum(1, keepdim=True).clamp_min(1)


def nearest_tasks(features: Tensor, tasks: Tensor) -> Tensor:
    """Return the task whose embedding is most similar to each row of `features` ``(rows, width)``."""
    return (F.normalize(features, dim=-1) @ F.normalize(tasks, dim=-1).mT).argmax(-1)
