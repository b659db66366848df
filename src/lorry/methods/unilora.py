"""Uni-LoRA: all low-rank matrices of a model are a fixed linear image of one trained vector."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Generator, Tensor

from lorry.core.errors import OptionError
from lorry.core.method.families import Bottleneck
from lorry.core.method.registry import register
from lorry.core.method.spec import Init, Layout, Tensors, TensorSpec, ones
from lorry.core.options import option
from lorry.core.sites.site import Site
from lorry.methods.parts.projections import fastfood, fastfood_specs, gaussian, gaussian_specs

DENSE = {"gaussian": gaussian_specs, "fastfood": fastfood_specs}


@register("uni-lora", paper="arXiv 2506.00799", identity_at_start=False)
@dataclass(frozen=True)
class UniLoRA(Bottleneck):
    """``θ_D = P θ_d``: every entry of every A and B is one entry of the vector θ_d, divided by the root of
    how often it is used.

    P has one nonzero in each row and ``Pᵀ P = I``, so distances are kept (section 3); two dense projections of the
    paper's comparison keep them in expectation. The order of θ_D is
    that of the sites' paths, A before B, row by row, whatever order the model lists them in. The update does
    not start at zero: with θ_d = 0 neither factor would get a gradient.

    Use it where the count of trained values must be a number of your choice, down to some hundreds for the whole
    model.
    """

    rank: int = option(4, "Rank of the matrices that are built.", at_least=1)
    size: int | None = option(
        None,
        "Length d of the trained vector; that of a LoRA of rank 1 on the same sites if not given.",
        at_least=1,
    )
    projection: str = option(
        "balanced",
        "How matrix entries choose theirs of the vector: balanced (each is used equally often, to one), "
        "independent (drawn singly), local (each site has a stretch of its own), identity (LoRA: all there are); or "
        "all of them at once: gaussian (a dense matrix: small models), fastfood (products of Hadamard matrices).",
        choices=("balanced", "independent", "local", "identity", "gaussian", "fastfood"),
    )
    normalize: bool = option(True, "Divide by the root of the number of uses.")
    projection_seed: int = option(42, "Seed of the assignment.", at_least=0)
    bound: float = option(0.02, "The vector starts uniformly within ± this.", above=0)
    save_indices: bool = option(
        False, "Write the assignment to the checkpoint instead of drawing it again when loading."
    )
    dropout: float = option(0.0, "Fraction of the update's input that is dropped in training.", at_least=0, below=1)

    def tensors(self, site: Site) -> dict[str, TensorSpec]:
        """Return the site's part of the assignment; the values belong to the whole model."""
        return self.layout([site]).sites[site.path]

    def layout(self, sites: Sequence[Site]) -> Layout:
        """Return the shared vector, its scales, and the assignment of each site's entries to it."""
        sizes = {s.path: math.prod(s.lead) * self.rank * (s.in_features + s.out_features) for s in sites}
        length = self._length(sum(sizes.values()))
        kept = torch.float32  # one vector moves in very small steps, so it is not cast with the adapter
        if self.projection in DENSE:
            scale = 1 / math.sqrt(sum(sizes.values())) if self.normalize else 1 / math.sqrt(length)
            specs, facts = DENSE[self.projection], (self.projection_seed, self.save_indices)
            own = {path: specs(n, length, scale, facts[0], path, facts[1]) for path, n in sizes.items()}
            return Layout(own, {"theta": TensorSpec((length,), self._start, dtype=kept)})
        assignment = Assignment(self.projection, dict(sorted(sizes.items())), length, self.projection_seed)
        dtype = torch.int32 if length < 2**31 else torch.int64
        own = {
            path: {
                "index": TensorSpec((n,), assignment.part(path), False, dtype, self.save_indices, within=range(length))
            }
            for path, n in sizes.items()
        }
        roots = assignment.inverse_roots if self.normalize else ones
        shared = {
            "theta": TensorSpec((length,), self._start, dtype=kept),
            "inverse_roots": TensorSpec((length,), roots, trained=False, dtype=kept, saved=self.save_indices),
        }
        return Layout(own, shared)

    def _length(self, total: int) -> int:
        if self.projection == "identity":
            if self.size not in (None, total):
                raise OptionError(f"UniLoRA: on these sites size must be {total} for 'identity', found {self.size}.")
            return total
        length = self.size or max(total // self.rank, 1)
        if length > total:
            raise OptionError(f"UniLoRA: size must be at most {total} (all entries of A and B), found {length}.")
        return length

    def _start(self, tensor: Tensor, generator: Generator) -> None:
        tensor.uniform_(-self.bound, self.bound, generator=generator)

    def factors(self, tensors: Tensors, site: Site) -> tuple[Tensor, Tensor]:
        """Make A and B of the vector."""
        size = math.prod(site.lead) * self.rank * (site.in_features + site.out_features)
        if self.projection == "gaussian":
            values = gaussian(tensors["theta"], tensors)
        elif self.projection == "fastfood":
            values = fastfood(tensors["theta"], tensors, size)
        else:
            values = (tensors["theta"] * tensors["inverse_roots"]).index_select(0, tensors["index"])
        a, b = values.split(
            [len(values) * w // (site.in_features + site.out_features) for w in (site.in_features, site.out_features)]
        )
        return a.view(*site.lead, self.rank, site.in_features), b.view(*site.lead, site.out_features, self.rank)


@dataclass(frozen=True)
class Assignment:
    """Which entry of the vector each entry of the matrices is, drawn once for all sites when first needed."""

    projection: str
    sizes: dict[str, int]
    length: int
    seed: int

    @cached_property
    def index(self) -> Tensor:
        """The assignment of all entries, in the order of the sites' paths."""
        total, generator = sum(self.sizes.values()), torch.Generator().manual_seed(self.seed)
        if self.projection == "identity":
            return torch.arange(total)
        if self.projection == "independent":
            return torch.randint(0, self.length, (total,), generator=generator)
        if self.projection == "balanced":
            return balanced(total, self.length, generator)
        parts, first, done = [], 0, 0
        for number in self.sizes.values():
            done += number
            last = max(done * self.length // total, first + 1)
            parts.append(first + balanced(number, last - first, generator))
            first = last
        return torch.cat(parts).clamp_max(self.length - 1)

    def part(self, path: str) -> Init:
        """Return an initialiser with the stretch of one site."""
        paths = list(self.sizes)
        first = sum(self.sizes[p] for p in paths[: paths.index(path)])
        return lambda tensor, generator: tensor.copy_(self.index[first : first + len(tensor)])

    @property
    def inverse_roots(self) -> Callable[[Tensor, Generator], object]:
        """An initialiser with ``1/√n_j``; 0 for entries that nothing uses."""

        def fill(tensor: Tensor, generator: Generator) -> None:
            uses = torch.bincount(self.index, minlength=self.length)
            tensor.copy_(torch.where(uses > 0, uses.double().rsqrt(), 0.0))

        return fill


def balanced(total: int, length: int, generator: Generator) -> Tensor:
    """Return `total` entries of ``range(length)`` in random order, each equally often to one."""
    extra = torch.randperm(length, generator=generator)[: total % length]
    every = torch.cat([torch.arange(length).repeat(total // length), extra])
    return every[torch.randperm(total, generator=generator)]
