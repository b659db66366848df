"""Model Stock: the mean of the updates, pulled to the base by how much they disagree."""

from __future__ import annotations

import torch

from lorry.merging.factors import Factors, cosines, gram
from lorry.merging.inputs import SiteInput
from lorry.merging.methods.task_arithmetic import weighted_sum
from lorry.merging.registry import merge_method


@merge_method("model-stock", space="delta", source="arXiv 2403.19522, equation 4")
def model_stock(site: SiteInput) -> Factors:
    """Weighted sum times ``n cos θ / (1 + (n - 1) cos θ)`` at each site, cos θ being the mean cosine of all pairs.

    Negative weights turn their update round before the angle is taken; a mean cosine below 0 gives the base (ratio 0).
    """
    rows = site.present()
    n = len(rows)
    if n == 1:
        return weighted_sum(site)
    signs = torch.tensor([1.0 if w >= 0 else -1.0 for _, _, w in rows], dtype=torch.float64)
    values = cosines(gram([f for _, f, _ in rows])) * signs.unsqueeze(0) * signs.unsqueeze(1)
    cosine = max(float((values.sum() - values.diagonal().sum()) / (n * (n - 1))), 0.0)
    ratio = n * cosine / (1 + (n - 1) * cosine)
    site.facts.update(mean_cosine=cosine, ratio=ratio)
    return weighted_sum(site).times(ratio)
