"""Answers that come piece by piece: server-sent events."""

from __future__ import annotations

import json
import logging
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from lorry.core.errors import LorryError
from lorry.serving.http.errors import ApiError, error_body, of_lorry

_log = logging.getLogger(__name__)
DONE = b"data: [DONE]\n\n"


class Events(StreamingResponse):
    """Sends events, and closes what makes them as soon as the client goes away."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[bytes, None]) -> None:
        super().__init__(events, headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send them."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._events.aclose()


async def streamed(pieces: AsyncGenerator[dict[str, Any], None]) -> Events:
    """Return the answer that sends pieces as they come.

    The first is awaited before anything is sent, so that a request which is refused gets a status of its own. An error
    after that is an event, and the last but one.
    """
    try:
        first = await anext(pieces)
    except BaseException:
        await pieces.aclose()
        raise
    return Events(_events(first, pieces))


async def _events(first: dict[str, Any], pieces: AsyncGenerator[dict[str, Any], None]) -> AsyncGenerator[bytes, None]:
    try:
        yield event(first)
        async for piece in _safely(pieces):
            yield event(piece)
        yield DONE
    finally:
        await pieces.aclose()


async def _safely(pieces: AsyncIterator[dict[str, Any]]) -> AsyncIterator[dict[str, Any]]:
    try:
        async for piece in pieces:
            yield piece
    except ApiError as error:
        yield error.body()
    except LorryError as error:
        yield of_lorry(error).body()
    except Exception as error:
        _log.exception("A stream failed.")
        yield error_body(500, f"The server failed at this request ({type(error).__name__}); its log says more.")


def event(data: dict[str, Any]) -> bytes:
    """Return one event."""
    return b"data: " + json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode() + b"\n\n"
