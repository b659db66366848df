"""Late interaction: how well documents of many vectors answer a query of many vectors."""

from __future__ import annotations

import torch
from torch import Tensor

from lorry.core.errors import OptionError

#: Cosines that are held at once.
COSINES = 1 << 24


def maxsim(
    queries: Tensor,
    documents: Tensor,
    query_mask: Tensor | None = None,
    document_mask: Tensor | None = None,
    *,
    most: int = COSINES,
) -> Tensor:
    """Return ``s(q, d) = sum_i max_j <q_i, d_j>``, the score of ColBERT.

    Parameters
    ----------
    queries
        Vectors ``(queries, tokens, width)``.
    documents
        Vectors ``(documents, tokens, width)``.
    query_mask, document_mask
        Where there is a token, ``(queries, tokens)`` and ``(documents, tokens)``; None for everywhere. What is padded
        adds nothing on the side of a query, and never is the greatest on the side of a document.
    most
        Products that are held at once; more are computed in chunks of documents, and of queries.

    Returns
    -------
    Tensor
        Scores ``(queries, documents)``.

    Raises
    ------
    OptionError
        Shapes that do not fit, or a document without a token.
    """
    if queries.ndim != 3 or documents.ndim != 3 or queries.shape[-1] != documents.shape[-1]:
        raise OptionError(
            "Expected queries and documents as (number, tokens, width) of one width, found "
            f"{tuple(queries.shape)} and {tuple(documents.shape)}."
        )
    seen = None if document_mask is None else document_mask.bool()
    if not documents.shape[1] or (seen is not None and not bool(seen.any(-1).all())):
        raise OptionError("A document without a token has no score; leave it out.")
    found = queries.new_empty(len(queries), len(documents))
    each = queries.shape[1] * documents.shape[1]
    rows = max(1, min(len(documents), most // max(each, 1)))
    batch = max(1, most // max(each * rows, 1))
    for top in range(0, len(queries), batch):
        some = queries[top : top + batch]
        counted = None if query_mask is None else query_mask[top : top + batch].bool()
        for start in range(0, len(documents), rows):
            part = slice(start, start + rows)
            products = torch.einsum("qiw,djw->qdij", some, documents[part])
            if seen is not None:
                products = products.masked_fill(~seen[part][None, :, None], float("-inf"))
            best = products.amax(-1)
            if counted is not None:
                best = best.masked_fill(~counted[:, None], 0.0)
            found[top : top + batch, part] = best.sum(-1)
    return found
