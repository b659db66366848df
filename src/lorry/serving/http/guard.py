"""What stands before the endpoints: limits of bodies and hosts, and the count of answers."""

from __future__ import annotations

from collections.abc import Callable, Collection

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lorry.serving.http.errors import ApiError

#: Bytes of a body, at most, unless the server says otherwise.
MOST_BYTES = 4 << 20


class Guard:
    """Lets requests through whose body and host are within the limits.

    Parameters
    ----------
    app
        What is guarded.
    count
        Called with the endpoint's path and the status of each answer.
    most_bytes
        Of a body.
    hosts
        Names that the header Host may have, so that no page of another site speaks to a server without keys on
        loopback through a name of its own; None for any.
    """

    def __init__(
        self,
        app: ASGIApp,
        count: Callable[[str, int], None],
        most_bytes: int = MOST_BYTES,
        hosts: Collection[str] | None = None,
    ) -> None:
        self.app, self.count, self.most_bytes, self.hosts = app, count, most_bytes, hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                self.count(getattr(scope.get("route"), "path", "other"), message["status"])
            await send(message)

        try:
            self._check_host(scope)
            body = await self._body(scope, receive)
        except ApiError as error:
            await error.response()(scope, receive, counted)
            return
        if body is not None:
            await self.app(scope, _again(body, receive), counted)

    def _check_host(self, scope: Scope) -> None:
        if self.hosts is not None and _host(_header(scope, b"host")) not in self.hosts:
            message = "This server without keys answers under the names of loopback alone; start it with keys."
            raise ApiError(403, message, code="host_not_allowed")

    async def _body(self, scope: Scope, receive: Receive) -> bytes | None:
        """Return the body, or None if the client went away."""
        length = _header(scope, b"content-length")
        if length.isdigit() and int(length[:20]) > self.most_bytes:
            raise self._too_large()
        parts, size = [], 0
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            parts.append(message.get("body", b""))
            size += len(parts[-1])
            if size > self.most_bytes:
                raise self._too_large()
            if not message.get("more_body", False):
                return b"".join(parts)

    def _too_large(self) -> ApiError:
        return ApiError(413, f"A body may have {self.most_bytes} bytes here; send less.", code="body_too_large")


def _header(scope: Scope, name: bytes) -> str:
    found: bytes = next((value for key, value in scope["headers"] if key == name), b"")
    return found.decode("latin-1")


def _host(header: str) -> str:
    """Return the name in ``NAME:PORT`` or ``[ADDRESS]:PORT``."""
    return header[1:].partition("]")[0] if header.startswith("[") else header.partition(":")[0].lower()


def _again(body: bytes, receive: Receive) -> Receive:
    """Return what gives a body that was read already, and then what the client does."""
    waiting = [body]

    async def received() -> Message:
        if waiting:
            return {"type": "http.request", "body": waiting.pop(), "more_body": False}
        return await receive()

    return received
