"""A uvicorn server that finishes what runs before it goes down."""

from __future__ import annotations

import asyncio
import ipaddress
from collections.abc import Callable
from types import FrameType
from typing import Any

import uvicorn
from fastapi import FastAPI

from lorry.core.errors import OptionError
from lorry.serving.service import Service
from lorry.serving.training.trainer import Trainer

#: Seconds for which an idle connection stays open: longer than clients keep theirs (httpx 5 s), so that no request
#: meets a connection that is just being closed.
KEEP_ALIVE = 30


class DrainingServer(uvicorn.Server):
    """Drains at the first signal: requests that run are finished, new ones get 503; a second signal ends it.

    Parameters
    ----------
    app, host, port
        What is served where; port 0 takes a free one.
    service
        What is drained.
    patience
        Seconds for what runs; what has not ended then is given up.
    ready
        Called with the server's address as soon as it listens.
    trainer
        What trains on the service's engine, and is closed before it; None for nothing.
    """

    def __init__(
        self,
        app: FastAPI,
        host: str,
        port: int,
        service: Service[Any],
        *,
        patience: float = 60.0,
        ready: Callable[[str], None] | None = None,
        trainer: Trainer | None = None,
    ) -> None:
        config = uvicorn.Config(
            app,
            host,
            port,
            log_level="warning",
            access_log=False,
            server_header=False,
            timeout_keep_alive=KEEP_ALIVE,
            timeout_graceful_shutdown=5,
        )
        super().__init__(config)
        self.host, self.service, self.patience, self.ready = host, service, patience, ready
        self.trainer = trainer
        self._loop: asyncio.AbstractEventLoop | None = None
        self._drain: asyncio.Task[None] | None = None
        self._told = False

    @property
    def address(self) -> str:
        """Where it listens."""
        port = self.servers[0].sockets[0].getsockname()[1]
        return f"http://{f'[{self.host}]' if ':' in self.host else self.host}:{port}"

    async def startup(self, sockets: list[object] | None = None) -> None:  # type: ignore[override]
        """Listen, and say so."""
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)  # type: ignore[arg-type]
        if self.started and self.ready is not None:
            self.ready(self.address)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to drain; at the second signal, end."""
        if self._told:
            self.force_exit = self.should_exit = True
        else:
            self.stop()

    def stop(self) -> None:
        """Begin to drain; may be called from any thread."""
        self._told = True
        self.service.drain()
        if self._loop is None:
            self.should_exit = True
        else:
            self._loop.call_soon_threadsafe(self._begin)

    def _begin(self) -> None:
        self._drain = asyncio.ensure_future(self._finish())

    async def _finish(self) -> None:
        await self.service.drained(self.patience)
        self.should_exit = True


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def check_exposed(host: str, keys: bool) -> None:
    """Raise `OptionError` unless the server has keys or only this machine reaches it."""
    if not keys and not is_loopback(host):
        raise OptionError(
            f"On {host}, others reach this server: it needs keys. Give --keys FILE or set LORRY_API_KEY, or serve on "
            "127.0.0.1."
        )
