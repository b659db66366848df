"""``/v1/rerank``: not yet."""

from __future__ import annotations

from fastapi import APIRouter, Response

from lorry.serving.http.bodies import RerankBody
from lorry.serving.http.errors import ApiError
from lorry.serving.http.state import WORKING

router = APIRouter(dependencies=WORKING, tags=["embeddings"])


@router.post("/v1/rerank")
async def rerank(body: RerankBody) -> Response:
    """Refuse: documents are ordered by a multi-vector head, and no base here has one."""
    message = (
        "This server has no head that orders documents. Compare the vectors of /v1/embeddings, or ask a server that "
        "has one."
    )
    raise ApiError(501, message, code="not_implemented")
