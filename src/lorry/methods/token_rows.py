"""Trained rows of an embedding: single tokens learn, the others stay."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lorry.core.errors import OptionError, SiteError
from lorry.core.method.families import WeightDelta
from lorry.core.method.registry import register
from lorry.core.method.spec import Tensors, TensorSpec
from lorry.core.options import option
from lorry.core.sites.site import Site
from lorry.kernels.sparse import scatter


@register("token-rows", paper="none", kinds=("linear", "embedding"))
@dataclass(frozen=True)
class TokenRows(WeightDelta):
    """Rows of an embedding table, or of an output head, that belong to some tokens get an update of their own, zero at
    the start: ``W'[t] = W[t] + ΔW[t]`` for the tokens t; all other rows stay.

    Use it for a handful of new or special tokens whose embeddings alone should be trained.
    """

    tokens: tuple[int, ...] = option((0,), "Indices of the tokens.")

    def check(self) -> None:
        """Refuse no tokens, negative ones, and one that is named twice."""
        wrong = not self.tokens or min(self.tokens) < 0 or len(set(self.tokens)) != len(self.tokens)
        if wrong:
            raise OptionError(
                "TokenRows: tokens must be different numbers from 0 on, at least one; found "
                f"{list(self.tokens)!r:.200}."
            )
        object.__setattr__(self, "tokens", tuple(sorted(self.tokens)))

    def check_site(self, site: Site) -> None:
        """Refuse tokens that the table does not have."""
        rows = site.in_features if site.kind.indexed else site.out_features
        if self.tokens[-1] >= rows:
            raise SiteError(
                f"'{site.path}' has {rows} rows, but a row of token {self.tokens[-1]} is to be trained. Resize the "
                f"embedding first: model.resize_token_embeddings({self.tokens[-1] + 1})."
            )

    def tensors(self, site: Site) -> dict[str, TensorSpec]:
        """Return the updates as ``(tokens, width)``, tokens in ascending order."""
        return {"rows": TensorSpec((len(self.tokens), site.out_features if site.kind.indexed else site.in_features))}

    def sparse(self, tensors: Tensors, site: Site) -> tuple[Tensor, Tensor]:
        """Return the positions of the rows, and their updates."""
        rows = tensors["rows"]
        tokens = torch.tensor(self.tokens, device=rows.device)
        width = torch.arange(rows.shape[-1], device=rows.device)
        if site.kind.indexed:
            return (width[:, None] * site.in_features + tokens).flatten(), rows.mT.flatten()
        return (tokens[:, None] * site.in_features + width).flatten(), rows.flatten()

    def delta(self, tensors: Tensors, site: Site) -> Tensor:
        """Return the rows in their places."""
        index, values = self.sparse(tensors, site)
        return scatter(values, index, site.out_features * site.in_features).view(site.shape)

    def bypass(self, x: Tensor, tensors: Tensors, site: Site) -> Tensor:
        """Return the update of the tokens that occur, or of their scores; no table is built."""
        rows = tensors["rows"]
        tokens = torch.tensor(self.tokens, device=x.device)
        if site.kind.indexed:
            return site.kind.up(site, (x.unsqueeze(-1) == tokens).to(rows.dtype), rows.mT)
        scores = x @ rows.to(x.dtype).mT
        return scores.new_zeros(*x.shape[:-1], site.out_features).index_copy(-1, tokens, scores)
