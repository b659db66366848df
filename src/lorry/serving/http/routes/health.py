"""``/health`` and ``/metrics``: for those who run the server."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request, Response

from lorry.serving.http.state import GUARDED, Shared, taken

router = APIRouter(tags=["operation"])


@router.get("/health")
async def health(request: Request) -> dict[str, Any]:
    """Tell that the server takes requests; 503 from when it shuts down, so that others get them."""
    taken(request)
    return {"status": "ok"}


@router.get("/metrics", dependencies=GUARDED)
async def metrics(serving: Shared) -> Response:
    """Return all figures for Prometheus."""
    return Response(serving.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")
