"""What stands between Ray Serve's HTTP proxy and the replicas: it reads which adapters a request names."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorry.serving.cluster.catalogue import Call, Catalogue, Head
from lorry.serving.http.errors import RETRY_AFTER, ApiError, error_body

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.responses import Response

_log = logging.getLogger(__name__)
#: How often a request is asked in all when replicas die under it, and the seconds before it is asked again.
_TRIES, _PAUSE = 4, 0.2


class Lost(Exception):
    """The replica of a request has died."""


class Front:
    """Sends each request to a replica, to one that holds its adapter where there is one that is not too busy.

    Parameters
    ----------
    replicas
        The handle of the replicas.
    base
        The base's name.
    adapters
        Name -> folder or file of the adapters that are known from the start.
    most_bytes
        Of a body.
    """

    def __init__(self, replicas: Any, base: str, adapters: Mapping[str, Path], most_bytes: int) -> None:
        self._replicas, self._most_bytes = replicas, most_bytes
        self._catalogue = Catalogue(base, adapters)

    async def __call__(self, request: Request) -> Response:
        """Answer a request: what a replica answers, or an error in OpenAI's shape."""
        from starlette.requests import ClientDisconnect
        from starlette.responses import Response

        try:
            call = await self._call(request)
            for number in range(_TRIES):
                try:
                    return await self._asked(call)
                except Lost:  # nothing of its answer has been sent, so another replica can give it whole
                    _log.warning("A replica died under %s %s; asking another one.", call.method, call.path)
                    await asyncio.sleep(_PAUSE * number)
            return _lost().response()
        except ApiError as error:
            return error.response()
        except ClientDisconnect:
            return Response(status_code=499)

    async def _call(self, request: Request) -> Call:
        body = bytearray()
        async for part in request.stream():
            body += part
            if len(body) > self._most_bytes:
                text = f"A body may have {self._most_bytes} bytes here; send less."
                raise ApiError(413, text, code="body_too_large")
        path, whole = request.url.path, bytes(body)
        headers = tuple((key, value) for key, value in request.headers.raw if key != b"transfer-encoding")
        query = request.url.query.encode()
        return self._catalogue.about(Call(request.method, path, query, headers, whole))

    async def _asked(self, call: Call) -> Response:
        from starlette.responses import Response, StreamingResponse

        stream = self._stream(call)
        head = await anext(stream)
        assert isinstance(head, Head)
        self._catalogue.answered(call, head)
        if dict(head.headers).get(b"content-type", b"").startswith(b"text/event-stream"):
            first = await anext(stream, b"")  # as long as nothing was sent, another replica may begin anew
            response: Response = StreamingResponse(_sent(first, stream), head.status)
        else:
            response = Response(b"".join([part async for part in stream if isinstance(part, bytes)]), head.status)
        own = [(key, value) for key, value in response.raw_headers if key == b"content-length"]
        response.raw_headers = [*((k, v) for k, v in head.headers if k != b"content-length"), *own]
        return response

    async def _stream(self, call: Call) -> AsyncGenerator[Head | bytes, None]:
        """Yield what a replica answers; raise `Lost` if it dies."""
        from ray.exceptions import RayActorError
        from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError

        id = call.places[0].id if call.places else ""
        handle = self._replicas.options(stream=True, multiplexed_model_id=id)
        answer = handle.answer.remote(call)
        try:
            async for part in answer:
                yield part
        except RayActorError as error:
            raise Lost from error
        except BackPressureError as error:
            text = "All replicas are busy and too many requests wait for one; try again later."
            raise ApiError(503, text, code="overloaded", retry_after=RETRY_AFTER) from error
        except DeploymentUnavailableError as error:
            text = "No replica can be started; the log of Ray Serve says why."
            raise ApiError(503, text, code="unavailable", retry_after=RETRY_AFTER) from error
        except GeneratorExit:
            answer.cancel()
            raise


async def _sent(first: Head | bytes, rest: AsyncGenerator[Head | bytes, None]) -> AsyncGenerator[bytes, None]:
    """Yield a stream of events; if its replica dies, an event says so at its end."""
    try:
        assert isinstance(first, bytes)
        yield first
        async for part in rest:
            assert isinstance(part, bytes)
            yield part
    except Lost:
        error = _lost()
        yield f"data: {json.dumps(error_body(error.status, error.message, error.code))}\n\n".encode()
    finally:
        await rest.aclose()


def _lost() -> ApiError:
    text = "The replica that answered this request has died; ask again."
    return ApiError(503, text, code="replica_lost", retry_after=RETRY_AFTER)
