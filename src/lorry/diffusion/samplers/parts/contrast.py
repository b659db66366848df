"""The contrastive loss between attention maps (CLoRA, arXiv 2403.19776)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lorry.core.errors import OptionError


def normed_maps(maps: Tensor, epsilon: float = 1e-8) -> Tensor:
    """Return maps with their least value at 0 and their largest at 1; a map that is flat becomes zero.

    Parameters
    ----------
    maps
        ``(maps, positions)``.
    epsilon
        Added to the range, which is zero for a flat map.
    """
    least, most = maps.amin(-1, keepdim=True), maps.amax(-1, keepdim=True)
    return (maps - least) / (most - least + epsilon)


def nt_xent(vectors: Tensor, labels: Sequence[int], temperature: float = 0.5) -> Tensor:
    """Return the NT-Xent loss: vectors of one label are drawn together, those of different labels apart.

    For each ordered pair (a, p) of one label the term is ``-log(e(a,p) / (e(a,p) + Σ_q e(a,q)))`` with
    ``e = exp(cosine / temperature)`` and q over all vectors of other labels; other positives do not stand in the
    denominator.

    Parameters
    ----------
    vectors
        ``(vectors, width)``.
    labels
        One for each.
    temperature
        Of the similarities.

    Returns
    -------
    Scalar: the mean over the pairs.

    Raises
    ------
    OptionError
        Labels in another number, or no two vectors with the same label.
    """
    if len(labels) != len(vectors):
        raise OptionError(f"Expected a label for each of {len(vectors)} vectors, found {len(labels)}.")
    marks = torch.tensor(list(labels), device=vectors.device)
    same = marks[:, None] == marks[None, :]
    pairs = same & ~torch.eye(len(marks), dtype=torch.bool, device=vectors.device)
    if not pairs.any():
        raise OptionError("A contrast needs two vectors with the same label; give a concept a word in two branches.")
    # a map of zeros is at a right angle to everything, and has no gradient that is not finite
    lengths = vectors.square().sum(-1, keepdim=True)
    unit = vectors * torch.where(lengths > 0, lengths, 1.0).rsqrt()
    logits = unit @ unit.mT / temperature
    # finite, so that a concept that stands alone has no gradient rather than none that is a number
    against = logits.masked_fill(same, torch.finfo(logits.dtype).min / 2).logsumexp(-1, keepdim=True)
    terms = torch.logaddexp(logits, against) - logits
    return terms[pairs].mean()
