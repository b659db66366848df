"""SHiRA: a few entries of the weight itself are trained; the update is sparse and of high rank."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Self

import torch
from torch import Generator, Tensor

from lorry.core.errors import OptionError, SiteError
from lorry.core.method.families import WeightDelta
from lorry.core.method.registry import register
from lorry.core.method.spec import Observed, Tensors, TensorSpec
from lorry.core.options import option
from lorry.core.sites.site import Site
from lorry.kernels.sparse import scatter, sparse_linear


@register("shira", paper="arXiv 2406.13175")
@dataclass(frozen=True)
class SHiRA(WeightDelta):
    """``ΔW = scatter(values)`` at K fixed positions of the weight, values zero at the start (section 3).

    Masks choose positions in each matrix on its own: random; struct, every n-th row or column and the
    diagonal; wm, the largest ``|W|``; grad and snip, the largest ``|G|`` and ``|W ⊙ G|`` of the mean gradient
    seen in calibration (until then they are those of wm). A function of the site gives scores of its own
    ``(*lead, out, in)``, of which the highest K are taken (or True at exactly K positions); in a checkpoint its mask is
    "given", since the positions lie there. `part` t > 0 takes the next K positions instead of the first, so that
    several adapters do not overlap. K is that of the density, or of a LoRA of `rank`; struct takes the densest grid
    that has no more.

    Use it where adapters are switched inside the weights quickly, or where several are added to one base: a few
    entries change, and those of two adapters seldom meet.
    """

    mask: str | Callable[[Site], Tensor] = option(
        "rand", "Which positions are trained.", choices=("rand", "struct", "wm", "grad", "snip", "given")
    )
    density: float = option(0.02, "Fraction of the positions that are trained.", above=0, at_most=1)
    rank: int | None = option(None, "Train as many as a LoRA of this rank, in place of the density.", at_least=1)
    every: int | None = option(
        None, "For struct: distance of the trained rows; by rank or density if not given.", at_least=1
    )
    axis: str = option("row", "For struct: rows or columns.", choices=("row", "column"))
    part: int = option(0, "Which K positions in the order of the mask, counted in K; not for struct.", at_least=0)
    dropout: float = option(0.0, "Fraction of the update's input that is dropped in training.", at_least=0, below=1)

    @property
    def calibration(self) -> Literal["none", "gradients", "inputs"]:
        """The gradient of the weight, for two of the masks."""
        return "gradients" if self.mask in ("grad", "snip") else "none"

    def check_site(self, site: Site) -> None:
        """Refuse more positions than the weight has."""
        size = site.out_features * site.in_features
        if self.count(site) * (self.part + 1) > size:
            raise SiteError(
                f"'{site.path}' has {size} positions, but part {self.part} of {self.count(site)} each needs "
                f"{self.count(site) * (self.part + 1)}. Lower rank, density or part."
            )

    def check(self) -> None:
        """Refuse parts of a structured mask."""
        if self.mask == "struct" and self.part:
            raise OptionError(
                f"SHiRA: a struct mask has no parts, found part {self.part}; choose another distance or axis."
            )
        if self.every and self.rank:
            raise OptionError(
                f"SHiRA: every and rank both say how many rows of a struct mask are trained, found every {self.every} "
                f"and rank {self.rank}; give one of them."
            )

    def to_dict(self) -> dict[str, Any]:
        """Return slug and options as plain data; what a function chose is in the tensors."""
        return {**super().to_dict(), "mask": "given" if callable(self.mask) else self.mask}

    def with_options(self, **options: Any) -> Self:
        """Return a copy with some options changed, checked anew."""
        return super().with_options(**{"mask": self.mask, **options})

    def count(self, site: Site) -> int:
        """Return K for one matrix."""
        if self.mask == "struct":
            return self._structured(site, self._step(site))
        return self._wanted(site)

    def _wanted(self, site: Site) -> int:
        """Return what rank or density ask for."""
        size = site.out_features * site.in_features
        return self.rank * (site.out_features + site.in_features) if self.rank else max(1, round(self.density * size))

    def _structured(self, site: Site, step: int) -> int:
        """Return how many positions every `step`-th row (or column) and the diagonal have."""
        along, across = site.out_features, site.in_features
        if self.axis == "column":
            along, across = across, along
        diagonal = min(along, across)
        return -(-along // step) * across + diagonal - -(-diagonal // step)

    def _step(self, site: Site) -> int:
        if self.every:
            return self.every
        if not self.rank:
            return max(1, round(1 / self.density))
        along = site.out_features if self.axis == "row" else site.in_features
        # one row and the diagonal are always fewer than a LoRA of rank 1 has
        return next(n for n in range(1, along + 1) if self._structured(site, n) <= self._wanted(site) or n == along)

    def _structure(self, site: Site) -> Tensor:
        rows, columns = torch.arange(site.out_features)[:, None], torch.arange(site.in_features)[None]
        along = rows if self.axis == "row" else columns
        chosen = (along % self._step(site) == 0) | (rows == columns)
        return chosen.flatten().nonzero().flatten()

    def tensors(self, site: Site) -> dict[str, TensorSpec]:
        """Return the values and their flat positions in ``(*lead, out, in)``, ascending."""
        total = math.prod(site.lead) * self.count(site)
        dtype = torch.int32 if math.prod(site.shape) < 2**31 else torch.int64
        return {
            "values": TensorSpec((total,)),
            "index": TensorSpec((total,), trained=False, dtype=dtype, within=range(math.prod(site.shape)), rising=True),
        }

    def setup(self, tensors: dict[str, Tensor], site: Site, generator: Generator) -> None:
        """Choose the positions."""
        if self.mask == "given":
            raise OptionError(
                "SHiRA: mask='given' stands for positions that are read from a checkpoint; a fresh adapter needs the "
                "function that chooses them, or another mask."
            )
        if callable(self.mask):
            self._choose(tensors, site, self._scores(site), generator)
        elif self.mask in ("rand", "struct"):
            self._choose(tensors, site, None, generator)
        else:
            self._choose(tensors, site, site.matrix().abs(), generator)

    def _scores(self, site: Site) -> Tensor:
        """Return what the function of the user's gives."""
        assert callable(self.mask)
        scores = self.mask(site)
        if not isinstance(scores, Tensor) or tuple(scores.shape) != site.shape:
            found = f"a tensor {tuple(scores.shape)}" if isinstance(scores, Tensor) else type(scores).__name__
            raise OptionError(
                f"SHiRA: the mask function must give a tensor {site.shape} at '{site.path}', found {found}."
            )
        if scores.dtype == torch.bool:
            each = scores.flatten(-2).sum(-1).unique().tolist()
            if self.part or each != [self.count(site)]:
                raise OptionError(
                    f"SHiRA: a mask function that gives True and False must give {self.count(site)} times True for "
                    f"each matrix of '{site.path}' (rank or density), and part 0; found {each} and part {self.part}. "
                    "Change the density, or give scores."
                )
        return scores

    def prepare(self, tensors: Tensors, site: Site, seen: Observed, generator: Generator) -> None:
        """Choose the positions by the gradient."""
        if seen.gradient is None:
            return
        weight = site.matrix().cpu().float() if self.mask == "snip" else 1.0
        self._choose(tensors, site, (weight * seen.gradient).abs(), generator)

    def _choose(self, tensors: Tensors, site: Site, scores: Tensor | None, generator: Generator) -> None:
        count, size = self.count(site), site.out_features * site.in_features
        first = self.part * count
        found = []
        for expert in range(math.prod(site.lead)):
            if self.mask == "struct":
                chosen = self._structure(site)
            elif scores is None:
                chosen = torch.randperm(size, generator=generator)[first : first + count]
            else:
                flat = scores.reshape(-1, size)[expert].float().cpu()
                chosen = flat.sort(descending=True, stable=True).indices[first : first + count]
            found.append(chosen.sort().values + expert * size)
        tensors["index"].copy_(torch.cat(found))

    def delta(self, tensors: Tensors, site: Site) -> Tensor:
        """Return the values at their positions."""
        return scatter(tensors["values"], tensors["index"], math.prod(site.shape)).view(site.shape)

    def sparse(self, tensors: Tensors, site: Site) -> tuple[Tensor, Tensor]:
        """Return positions and values."""
        return tensors["index"], tensors["values"]

    def bypass(self, x: Tensor, tensors: Tensors, site: Site) -> Tensor:
        """Return ``ΔW x``; at linear sites by an operation whose backward pass keeps no dense gradient."""
        if not site.kind.plain_product:
            return super().bypass(x, tensors, site)
        return sparse_linear(x, tensors["values"], tensors["index"], (site.out_features, site.in_features))
