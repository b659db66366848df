"""How far two samples of inputs lie apart, as a frozen model sees them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lorry.training.encode import special_prefix, tokenize

from .generate import quietly
from .kit import Base


def median_distance(a: Tensor, b: Tensor) -> float:
    """Return the median distance between different rows of both, the bandwidth of `mmd`."""
    both = torch.cat([a, b]).double()
    return float(torch.pdist(both).median())


def mmd(a: Tensor, b: Tensor, bandwidth: float | None = None) -> float:
    """Return the squared maximum mean discrepancy of two samples under a Gaussian kernel (biased estimate).

    Parameters
    ----------
    a, b
        Features ``(n, d)`` and ``(m, d)``.
    bandwidth
        Of the kernel ``exp(-||x - y||^2 / (2 bandwidth^2))``; `median_distance` if not given.
    """
    width = bandwidth or median_distance(a, b)

    def kernel(x: Tensor, y: Tensor) -> float:
        return float((-torch.cdist(x.double(), y.double()).square() / (2 * width**2)).exp().mean())

    return kernel(a, a) + kernel(b, b) - 2 * kernel(a, b)


def features(base: Base, inputs: Sequence[str], batch: int = 64) -> Tensor:
    """Return the mean last hidden state of each input ``(n, width)``, without any adapter."""
    prefix, found = special_prefix(base.tokenizer), []
    device = next(base.model.parameters()).device
    for start in range(0, len(inputs), batch):
        coded = [prefix + ids for ids in tokenize(base.tokenizer, inputs[start : start + batch])]
        width = max(map(len, coded))
        ids = torch.tensor([c + [0] * (width - len(c)) for c in coded], device=device)
        mask = torch.tensor([[1] * len(c) + [0] * (width - len(c)) for c in coded], device=device)
        with quietly(base.model, None, len(coded)):
            hidden = base.model(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states[-1]
        found.append((hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True))
    return torch.cat(found)
