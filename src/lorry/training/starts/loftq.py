"""LoftQ's start: what quantising the base has cut off."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Generator, Tensor

from lorry.core.errors import OptionError, SiteError
from lorry.core.forward.entry import Entry
from lorry.core.method.spec import Observed
from lorry.core.options import option
from lorry.methods.parts.decompose import split_evenly, truncated_svd
from lorry.training.starts import LowRankStart, rank_of, register_start, scale_of


@register_start("loftq", paper="arXiv 2310.08659")
@dataclass(frozen=True)
class LoftQ(LowRankStart):
    """``scale · B A`` starts at the best approximation of ``W - Q``, where W is the weight before quantising and Q the
    one that the base has; the model's function changes, towards that of the full weights.

    The paper quantises ``W - B A`` again and again (algorithm 1); here Q is the base's own and stays, since other
    adapters share it, which is one of its iterations.
    """

    original: str = option("", "Folder or safetensors file with the weights before quantising.")
    iterations: int = option(0, "Subspace iterations of a fast randomised SVD; 0 computes the exact one.", at_least=0)

    def check(self) -> None:
        """Refuse a start without the weights that it compares with."""
        files = self._files()
        if not files:
            raise OptionError(
                "The start 'loftq' compares the base with its weights before quantising: set original to their folder "
                f"or safetensors file, found {self.original!r}."
            )

    @property
    def keeps_function(self) -> bool:
        """It does not: its product makes good what quantising has changed."""
        return False

    def check_entry(self, entry: Entry) -> None:
        """Refuse a method whose update is not the product of its A and B."""
        super().check_entry(entry)
        if not {"plain", "stored"} <= entry.method.capabilities:
            raise SiteError(
                f"'{entry.site.path}' has the method {entry.method.info.slug}, which cannot begin with the start "
                "'loftq': its update is not the product of A and B alone. Take LoRA or LoRA-FA."
            )

    def _files(self) -> list[Path]:
        path = Path(self.original)
        if not self.original or not path.exists():
            return []
        return sorted(path.glob("*.safetensors")) if path.is_dir() else [path]

    def factors(self, entry: Entry, seen: Mapping[str, Observed], generator: Generator) -> tuple[Tensor, Tensor]:
        """Decompose what the base lacks."""
        site = entry.site
        lost = self._full(entry).float().cpu() - site.matrix().float().cpu()
        if not bool(lost.any()):
            raise SiteError(
                f"The weight of '{site.path}' is the same as in '{self.original}', so the start 'loftq' has nothing to "
                "make good. Load the base quantised, or leave the start out."
            )
        triples = truncated_svd(lost, rank_of(entry), self.iterations, generator)
        return split_evenly(*triples, scale_of(entry))

    def _full(self, entry: Entry) -> Tensor:
        """Return the weight before quantising as ``(*lead, out, in)``."""
        site = entry.site
        owner = site.path if site.path.rpartition(".")[2] != site.parameter else site.path.rpartition(".")[0]
        name = f"{owner}.{site.parameter}"
        for file in self._files():
            with safe_open(file, framework="pt") as opened:
                found = next((k for k in opened.keys() if k == name or k.endswith(f".{name}")), None)  # noqa: SIM118
                if found is not None:
                    full = site.kind.to_matrix(site, opened.get_tensor(found))
                    if full.shape == torch.Size(site.shape):
                        return full
        raise SiteError(
            f"'{self.original}' has no tensor '{name}' of {site.shape} for '{site.path}'. Set original of the start "
            "'loftq' to the weights from which this base was quantised."
        )
