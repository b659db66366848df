"""What the endpoints of training share."""

from __future__ import annotations

from typing import Annotated, Any, cast

from fastapi import Depends, Request
from fastapi.responses import JSONResponse

from lorry.serving.http.errors import ApiError
from lorry.serving.http.keys import Holder
from lorry.serving.http.state import at_once, serving_of
from lorry.serving.service import Overloaded
from lorry.serving.training.desk import Desk
from lorry.serving.training.errors import Missing
from lorry.serving.training.store import Entry


def desk_of(request: Request) -> Desk:
    """Return what takes the requests of an app."""
    return cast(Desk, request.app.state.desk)


def owner_of(request: Request) -> Holder:
    """Return who asks: the client sends its key as ``X-API-Key``; raise 401 if nobody known does."""
    headers, keys = request.headers, serving_of(request).keys
    secret = headers.get("x-api-key")
    return keys.holder(headers.get("authorization") if secret is None else f"Bearer {secret}")


_OWNER = Depends(at_once(owner_of))
#: Arguments of endpoints.
Taking = Annotated[Desk, Depends(at_once(desk_of))]
Owner = Annotated[Holder, _OWNER]
GUARDED: Any = [_OWNER]


def promise(entry: Entry) -> dict[str, Any]:
    """Return what tells a client where its answer will be."""
    return {"request_id": f"{entry.model}:{entry.seq}", "model_id": entry.model}


async def missing(_: Request, error: Exception) -> JSONResponse:
    """Answer for what is not there."""
    return ApiError(404, str(error)).response()


async def overloaded(_: Request, error: Exception) -> JSONResponse:
    """Answer when there is too much: the client waits and tries again."""
    return ApiError(429, str(error), code="overloaded", retry_after=1).response()


#: Errors of training that have a status of their own.
HANDLERS = {Missing: missing, Overloaded: overloaded}
