"""What the endpoints of one app share, and how they get at it."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, TypeVar, cast

from fastapi import Depends, Request

from lorry.serving.agents.sessions import Sessions
from lorry.serving.engine import Engine
from lorry.serving.http.errors import ApiError
from lorry.serving.http.keys import Holder, Keys
from lorry.serving.http.metrics import Metrics
from lorry.serving.http.names import composition_of, unknown
from lorry.serving.http.prompts import Prompts
from lorry.serving.modes.mode import Mode
from lorry.serving.service import Draining, Service
from lorry.serving.training.names import SERVED

T = TypeVar("T")


@dataclass
class Serving:
    """An engine with what HTTP needs beside it.

    Attributes
    ----------
    base
        The name of the base in ``model``.
    context, vocabulary
        Tokens of prompt and answer together at most, and tokens that the base knows.
    folders
        Adapters are loaded from below these alone; with none, not at all.
    modes
        By their names, which are also those of their adapters: what embeds and ranks, and generates nothing.
    created
        When the app was made, in seconds since 1970.
    """

    engine: Engine
    service: Service[Engine]
    prompts: Prompts
    keys: Keys
    base: str
    context: int
    vocabulary: int
    folders: tuple[Path, ...] = ()
    modes: dict[str, Mode] = field(default_factory=dict)
    created: int = field(default_factory=lambda: int(time.time()))

    def __post_init__(self) -> None:
        """Make the figures."""
        self.metrics = Metrics(self.engine.stats)
        self.sessions = Sessions(self.engine)

    @classmethod
    def over(
        cls, service: Service[Engine], prompts: Prompts, keys: Keys, base: str, folders: tuple[Path, ...] = ()
    ) -> Serving:
        """Return what an app over a service needs; the limits are those of its engine."""
        engine = service.engine
        return cls(engine, service, prompts, keys, base, engine.context, engine.vocabulary, folders)

    def composition(self, model: str | None, holder: Holder) -> dict[str, float]:
        """Return what a model's name stands for; raise as `composition_of`, and 403 if this key may not use it."""
        found = composition_of(model, self.base)
        holder.check_model(found)
        return found

    def generating(self, model: str | None, holder: Holder) -> dict[str, float]:
        """Return what a model's name stands for that takes part in the base's own mode; raise 400 for another mode."""
        found = self.composition(model, holder)
        mode = next((name for name in found if name in self.modes), None)
        if mode is not None:
            message = f"'{mode}' is a mode of retrieval: give it as the model of /v1/embeddings or /v1/rerank, alone."
            raise ApiError(400, message, code="not_generative", param="model")
        return found

    def unknown(self, model: str | None, holder: Holder) -> ApiError:
        """Return the answer to a model that is not served; it names those alone that the key may use."""
        return unknown(model or self.base, [self.base, *filter(holder.may_use, self.names())])

    def names(self) -> list[str]:
        """Return the names of the adapters that are served, without those that clients train."""
        names = {adapter.name: None for adapter in self.engine.adapters()}
        return [name for name in names if not name.startswith(SERVED)]


def serving_of(request: Request) -> Serving:
    """Return what the app of a request shares."""
    return cast(Serving, request.app.state.serving)


def holder_of(request: Request) -> Holder:
    """Return who asks; raise 401 if nobody known does."""
    return serving_of(request).keys.holder(request.headers.get("authorization"))


def taken(request: Request) -> None:
    """Raise 503 when nothing new is taken, or nothing could be answered."""
    service = serving_of(request).service
    if service.draining:
        raise Draining("The server is shutting down and takes no new requests; ask another one.")
    if not service.alive:
        raise ApiError(503, "The engine has stopped; its log says why. Start the server again.", code="stopped")


def at_once(read: Callable[[Request], T]) -> Callable[[Request], Awaitable[T]]:
    """Return a dependency that reads on the loop: a plain function would go to a thread and back for each request."""

    async def dependency(request: Request) -> T:
        return read(request)

    return dependency


_HOLDER = Depends(at_once(holder_of))
#: Arguments of endpoints.
Shared = Annotated[Serving, Depends(at_once(serving_of))]
Caller = Annotated[Holder, _HOLDER]
#: Dependencies of routers: the key first, so that nobody unknown learns anything.
GUARDED: Any = [_HOLDER]
WORKING: Any = [_HOLDER, Depends(at_once(taken))]
