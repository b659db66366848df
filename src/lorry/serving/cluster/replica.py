"""One replica: the app and the engine of a server that is alone, with adapters that come as they are asked for."""

from __future__ import annotations

import asyncio
import logging
import os
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Iterable
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from lorry.core.errors import AdapterError, LorryError
from lorry.serving.cluster.catalogue import LOAD, UNLOAD, Call, Head, Place, fields_of
from lorry.serving.engine import Engine
from lorry.serving.http.app import create_app
from lorry.serving.http.errors import ApiError, of_lorry
from lorry.serving.http.routes.adapters import allowed
from lorry.serving.http.state import Serving

_log = logging.getLogger(__name__)
#: The names that are served, for the request of this task.
_NAMES: ContextVar[tuple[str, ...]] = ContextVar("lorry_cluster_names", default=())
#: Says which replica answered.
REPLICA = b"x-lorry-replica"
#: Seconds for the app to notice that its client went away.
_AFTER_CLIENT = 5.0


class ClusterServing(Serving):
    """What the app of a replica shares: names are those of the whole cluster."""

    def names(self) -> list[str]:
        """Return the names of the adapters that are served."""
        return list(_NAMES.get())


class Loaded:
    """An adapter in a replica's engine; it is unloaded when Ray Serve lets go of it and no request needs it."""

    def __init__(self, replica: Replica, place: Place) -> None:
        self.replica, self.place, self.gone = replica, place, False

    def __del__(self) -> None:
        """Leave the engine; called when the replica holds more adapters than it may, and never twice in effect."""
        self.replica.released(self)


class Replica:
    """A replica as Ray Serve runs it.

    Parameters
    ----------
    make
        Returns the engine with what belongs to it, its adapters not loaded.
    held
        Adapters that it holds, at most.
    health_patience
        Seconds after which an engine that does not come to its next step is held for dead.
    app_options
        Of `create_app`.
    """

    def __init__(
        self, make: Callable[[], Serving], held: int, health_patience: float, app_options: dict[str, Any]
    ) -> None:
        from ray import serve

        made = make()
        self.serving = ClusterServing(**{name: getattr(made, name) for name in Serving.__dataclass_fields__})
        self._app = create_app(self.serving, **app_options)
        self._patience = health_patience
        self._held: dict[str, Loaded] = {}
        self._users: Counter[str] = Counter()
        self._id = f"{serve.get_replica_context().replica_id.unique_id}-{os.getpid()}".encode()

        # what Ray Serve calls a model is an adapter here; it tells the routers which replica holds which
        async def adapter(id: str) -> Loaded:
            name, _, version = id.rpartition("@")
            return await asyncio.to_thread(self._load, Place(name, self._paths[id], int(version)))

        self._paths: dict[str, Path] = {}
        self._adapter = serve.multiplexed(max_num_models_per_replica=held)(adapter)

    def __del__(self) -> None:
        """End the engine; Ray Serve calls it when nothing runs any longer."""
        if hasattr(self, "serving"):
            self.serving.service.close()
            self.engine.close()

    @property
    def engine(self) -> Engine:
        """The engine."""
        return self.serving.engine

    async def check_health(self) -> None:
        """Raise unless the engine's thread comes to its next step; Ray Serve then replaces this replica."""
        await asyncio.wait_for(self.serving.service.call(lambda: None), self._patience)

    async def answer(self, call: Call) -> AsyncGenerator[Head | bytes, None]:
        """Yield the head of an answer, then its body piece by piece."""
        names = [place.name for place in call.places]
        self._users.update(names)
        try:
            try:
                await self._bring(call)
                answer = self._through_app(call)
            except LorryError as error:
                answer = _refused(of_lorry(error))
            async for part in answer:
                yield part
        finally:
            self._users.subtract(names)
            for name in names:
                loaded = self._held.get(name)
                if loaded is not None and loaded.gone:
                    await asyncio.to_thread(self.released, loaded)

    # -- adapters

    async def _bring(self, call: Call) -> None:
        """Load what a request needs and this replica lacks, if whoever asks may use it."""
        try:
            holder = self.serving.keys.holder(call.header(b"authorization"))
            holder.check_model({place.name: 1.0 for place in call.places})
        except ApiError:  # the app says so
            return
        for place in call.places:
            self._paths[place.id] = place.path
            try:
                loaded = await self._adapter(place.id)
            finally:
                self._paths.pop(place.id, None)
            if self._held.get(place.name) is not loaded:  # another version of the name was asked for meanwhile
                await asyncio.to_thread(self._load, place)
        for name in call.missing:
            if name in self._held:  # it was unloaded by way of another replica
                await asyncio.to_thread(self._unload, self._held[name])

    def _load(self, place: Place) -> Loaded:
        self.engine.load(place.name, place.path)
        loaded = Loaded(self, place)
        self._held[place.name] = loaded
        return loaded

    def released(self, loaded: Loaded) -> None:
        """Unload an adapter, unless requests need it still or another version has its name."""
        if self._held.get(loaded.place.name) is not loaded:
            return
        loaded.gone = True
        if self._users[loaded.place.name] <= 0:
            self._unload(loaded)

    def _unload(self, loaded: Loaded) -> None:
        if self._held.get(loaded.place.name) is loaded:
            del self._held[loaded.place.name]
            try:
                self.engine.unload(loaded.place.name)
            except AdapterError:  # the app unloaded it
                _log.debug("%s had left already", loaded.place.name)

    # -- the app

    async def _through_app(self, call: Call) -> AsyncGenerator[Head | bytes, None]:
        """Yield what the app answers; it learns when nobody reads on."""
        messages: asyncio.Queue[Any] = asyncio.Queue()
        gone, bodies = asyncio.Event(), [call.body]

        async def receive() -> dict[str, Any]:
            if bodies:
                return {"type": "http.request", "body": bodies.pop(), "more_body": False}
            await gone.wait()
            return {"type": "http.disconnect"}

        async def run() -> None:
            _NAMES.set(call.names)
            try:
                await self._app(_scope(call), receive, messages.put)
            except Exception:  # its client has got a 500 already
                _log.exception("%s %s failed", call.method, call.path)
            finally:
                messages.put_nowait(None)

        task = asyncio.create_task(run())
        try:
            while (message := await messages.get()) is not None:
                if message["type"] == "http.response.start":
                    yield self._head(call, message["status"], message["headers"])
                elif message.get("body"):
                    yield message["body"]
        finally:
            gone.set()
            await asyncio.wait({task}, timeout=_AFTER_CLIENT)
            task.cancel()

    def _head(self, call: Call, status: int, headers: Iterable[tuple[bytes, bytes]]) -> Head:
        """Return the head of an answer, and take note of what the app did to the engine's adapters."""
        loaded = None
        if call.path == LOAD and status == 200:
            loaded = allowed(fields_of(call.body)["lora_path"], self.serving.folders)
        if call.path == UNLOAD and status == 200:
            for place in call.places:
                self._held.pop(place.name, None)
        return Head(status, (*headers, (REPLICA, self._id)), loaded)


async def _refused(error: ApiError) -> AsyncGenerator[Head | bytes, None]:
    response = error.response()
    yield Head(response.status_code, tuple(response.raw_headers))
    yield bytes(response.body)


def _scope(call: Call) -> dict[str, Any]:
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},  # since 2.4 a client that went away shows in sending alone
        "http_version": "1.1",
        "method": call.method,
        "scheme": "http",
        "path": call.path,
        "raw_path": call.path.encode(),
        "root_path": "",
        "query_string": call.query,
        "headers": list(call.headers),
        "client": None,
        "server": None,
    }
